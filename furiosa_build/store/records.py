"""The files that record a finished action: its outputs and what they cost, and the factors of its key."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter

from furiosa_build.core.canonical_json import canonical_json, digest
from furiosa_build.core.failpoints import reach

MANIFEST = "manifest.json"
FACTORS = "key_factors.json"

_OBJECT = TypeAdapter(dict[str, Any])
_T = TypeVar("_T")


class Output(BaseModel):
    """One file that an action made."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    size: int
    sha256: str


class ActionRecord(BaseModel):
    """A finished action: its outputs by relative path, and what they cost (not part of any digest).

    `seconds`: how long it took. `peak_memory` and `peak_mapped`: its peak use of private memory and of mapped file
    pages, in bytes; None where unknown.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    key: str
    step: str
    seconds: float
    peak_memory: int | None = None
    peak_mapped: int | None = None
    outputs: dict[str, Output]

    @property
    def digest(self) -> str:
        """Digest of the outputs' names and contents: what later steps depend on."""
        return digest({path: output.sha256 for path, output in self.outputs.items()})


def read_action(directory: Path) -> tuple[ActionRecord, dict[str, Any]]:
    """The action in `directory`, which is named by its key, and the factors of the key.

    Raises OSError, or ValueError that names the file, when it is damaged: the key is the digest of the factors, and the
    manifest holds its own digest.
    """
    return _read(directory / MANIFEST, _record), _read(directory / FACTORS, _factors)


def write_action(directory: Path, record: ActionRecord, factors: Mapping[str, Any]) -> None:
    """Publishes an action: the manifest comes last, by a rename."""
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / FACTORS, canonical_json(factors))
    manifest = record.model_dump(mode="json")
    _write(directory / MANIFEST, canonical_json({**manifest, "sha256": digest(manifest)}), announced=True)


def _read(path: Path, parse: Callable[[bytes, str], _T]) -> _T:
    try:
        return parse(path.read_bytes(), path.parent.name)
    except ValueError as error:
        raise ValueError(f"{path} is damaged") from error


def _record(data: bytes, key: str) -> ActionRecord:
    manifest = _OBJECT.validate_json(data)
    if manifest.pop("sha256", None) != digest(manifest):
        raise ValueError("its digest does not match")
    record = ActionRecord.model_validate(manifest)
    if record.key != key:
        raise ValueError("it belongs to another action")
    return record


def _factors(data: bytes, key: str) -> dict[str, Any]:
    factors = _OBJECT.validate_json(data)
    if digest(factors) != key:
        raise ValueError("they belong to another key")
    return factors


def _write(path: Path, data: bytes, announced: bool = False) -> None:
    """Writes a file atomically. `announced`: with the fail points of a manifest."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data[: len(data) // 2])
            if announced:
                file.flush()
                reach("mid-write")
            file.write(data[len(data) // 2 :])
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        if announced:
            reach("before-rename")
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if announced:
        reach("after-rename")


class Outcome(NamedTuple):
    """A finished action. `ran` tells whether this process did the work, or found it in the store."""

    record: ActionRecord
    ran: bool
