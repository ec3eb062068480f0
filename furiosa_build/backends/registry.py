"""Backends by name: those of this package, then the entry points of group `furiosa_build.backends`."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import cast

from furiosa_build.backends.base import Backend
from furiosa_build.core.errors import UserError, nearest

_OWN = {
    "inductor": "furiosa_build.backends.inductor:InductorBackend",
    "eager": "furiosa_build.backends.eager:EagerBackend",
}


_GROUP = "furiosa_build.backends"


def get_backend(name: str) -> Backend:
    """The backend called `name`. Raises UserError that lists the registered names."""
    if name in _OWN:
        module, _, attribute = _OWN[name].partition(":")
        return cast(Backend, getattr(import_module(module), attribute)())
    others = {entry.name: entry for entry in entry_points(group=_GROUP)}
    if name in others:
        return cast(Backend, others[name].load()())
    names = sorted({*_OWN, *others})
    raise UserError(
        f"unknown backend {name!r}", where="backend.name", valid=", ".join(names), hint=nearest(name, names)
    )
