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
    "native": "furiosa_build.backends.native.backend:NativeBackend",
}


_GROUP = "furiosa_build.backends"


def find_backend(name: str) -> Backend | None:
    """The backend called `name`, if it is registered."""
    if name in _OWN:
        module, _, attribute = _OWN[name].partition(":")
        return cast(Backend, getattr(import_module(module), attribute)())
    entry = next((entry for entry in entry_points(group=_GROUP) if entry.name == name), None)
    return None if entry is None else cast(Backend, entry.load()())


def get_backend(name: str) -> Backend:
    """The backend called `name`. Raises UserError that lists the registered names."""
    backend = find_backend(name)
    if backend is not None:
        return backend
    names = sorted({*_OWN, *(entry.name for entry in entry_points(group=_GROUP))})
    raise UserError(
        f"unknown backend {name!r}", where="backend.name", valid=", ".join(names), hint=nearest(name, names)
    )
