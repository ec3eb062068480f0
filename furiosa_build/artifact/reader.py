"""Opens an artifact and makes sure that it is whole, unchanged and runnable here, before anything uses it.

Nothing of the artifact is trusted: sizes are limited before parsing, and no path is followed out of its
directory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from furiosa_build import host
from furiosa_build.artifact.safetensors_header import check_safetensors
from furiosa_build.artifact.schema import (
    ARTIFACT_FILE,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    Artifact,
    FileRecord,
    Manifest,
    Record,
    artifact_id,
    timeless,
)
from furiosa_build.canonical import canonical_json
from furiosa_build.errors import UserError

_MAX_JSON_BYTES = 32 * 2**20
_MAX_JSON_DEPTH = 64
_PARAMETERS = "params"

_R = TypeVar("_R", bound=Record)


@dataclass(frozen=True)
class OpenArtifact:
    """A verified artifact. `directory` is absolute, with symbolic links such as `latest` resolved."""

    directory: Path
    artifact: Artifact
    manifest: Manifest

    def path(self, file: str) -> Path:
        """The path of one of the artifact's files, by its name in the manifest."""
        return self.directory / file


def open_artifact(path: str | Path, verify: Literal["fast", "full"] = "fast") -> OpenArtifact:
    """Opens and verifies the artifact in directory `path`.

    Args:
        path: The artifact's directory.
        verify: `fast` reads all files but those in params/ and compares their digests; of parameters it
            checks sizes and headers. `full` reads those too.

    Raises:
        UserError: It is no artifact, is damaged, is of another schema version, or cannot run on this machine.
            One message, which names the file.
    """
    directory = Path(os.path.realpath(path))
    if not directory.is_dir():
        raise UserError(f"{path} is not a directory", where=str(path), valid="the directory of an artifact")
    for name in (ARTIFACT_FILE, MANIFEST_FILE):
        if not (directory / name).exists():
            hint = f"did you mean {path}/latest?" if (directory / "latest").is_dir() else ""
            raise UserError(f"{path} is not an artifact: it has no {name}", where=str(path), hint=hint)
    try:
        return _open(directory, verify)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}", where=str(error.filename or path)) from error


def _open(directory: Path, verify: Literal["fast", "full"]) -> OpenArtifact:
    _check_links(directory)
    manifest = _read(directory / MANIFEST_FILE, Manifest)
    artifact = _read(directory / ARTIFACT_FILE, Artifact)
    opened = OpenArtifact(directory, artifact, manifest)
    _check_files(opened)
    _check_references(opened)
    _check_host(opened)
    _check_content(opened, verify)
    return opened


def _damaged(what: str, file: Path) -> UserError:
    return UserError(f"damaged artifact: {what}", where=str(file), hint="build or copy it again")


# JSON


def _read(path: Path, record: type[_R]) -> _R:
    data = _parse(path)
    found = data.get("schema_version")
    if found != SCHEMA_VERSION or isinstance(found, bool):
        raise UserError(
            f"{path.name} is of schema version {found!r:.40}",
            where=str(path),
            valid=str(SCHEMA_VERSION),
            hint="use the furiosa_build that made the artifact, or build it again",
        )
    try:
        return record.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _damaged(f"{path.name}: {place}: {first['msg']}", path) from error


def _parse(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise _damaged(f"{path.name} has {size} bytes, more than {_MAX_JSON_BYTES}", path)
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_each_key_once)
        depth = _depth(value)
        canonical_json(value)  # refuses what JSON has no form for, such as NaN, 1e999 and half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise _damaged(f"{path.name} is no JSON: {error}", path) from error
    if not isinstance(value, dict):
        raise _damaged(f"{path.name} is no JSON object", path)
    if depth > _MAX_JSON_DEPTH:
        raise _damaged(f"{path.name} is nested {depth} levels deep, more than {_MAX_JSON_DEPTH}", path)
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _depth(value: Any) -> int:
    """How deep lists and objects are nested, without recursion."""
    depth, level = 0, [value]
    while containers := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return depth


# Files


def _check_links(directory: Path) -> None:
    """Before anything is opened: only regular files, and links to such that stay within the directory."""
    for path in _walk(directory):
        name = path.relative_to(directory)
        if not Path(os.path.realpath(path)).is_relative_to(directory):
            raise _damaged(f"{name} is a link out of the artifact", path)
        if not path.is_file():
            raise _damaged(f"{name} is no regular file", path)


def _walk(directory: Path) -> Iterable[Path]:
    """All that is not a real directory, in order."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path)


def _check_files(opened: OpenArtifact) -> None:
    """The manifest lists what there is, no more and no less, in its right size."""
    directory, files = opened.directory, opened.manifest.files
    manifest_path = directory / MANIFEST_FILE
    for name in files:
        if not _stays_inside(name):
            raise _damaged(f"{MANIFEST_FILE} lists {name!r}, which is no plain path in the artifact", manifest_path)
    if ARTIFACT_FILE not in files:
        raise _damaged(f"{MANIFEST_FILE} does not list {ARTIFACT_FILE}", manifest_path)
    found = {path.relative_to(directory).as_posix() for path in _walk(directory)} - {MANIFEST_FILE}
    for name in sorted(set(files) - found):
        raise _damaged(f"{name} is missing", directory / name)
    for name in sorted(found - set(files)):
        raise _damaged(f"{name} is not in {MANIFEST_FILE}", directory / name)
    for name, record in files.items():
        size = len(timeless(opened.artifact)) if name == ARTIFACT_FILE else opened.path(name).stat().st_size
        if size != record.size:
            raise _damaged(f"{name} has {size} bytes, {record.size} by {MANIFEST_FILE}", directory / name)


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = path.as_posix() == name and "\\" not in name and "\0" not in name
    return plain and not path.is_absolute() and name != "." and ".." not in path.parts


def _check_content(opened: OpenArtifact, verify: Literal["fast", "full"]) -> None:
    directory, files = opened.directory, opened.manifest.files
    for name, record in files.items():
        if _is_parameters(name):
            check_safetensors(opened.path(name))
            if verify == "fast":
                continue
        if _sha256(opened, name) != record.sha256:
            raise _damaged(f"the sha256 of {name} is not that of {MANIFEST_FILE}", directory / name)
    _check_id(opened, files)


def _is_parameters(name: str) -> bool:
    return PurePosixPath(name).parts[0] == _PARAMETERS


def _sha256(opened: OpenArtifact, name: str) -> str:
    if name == ARTIFACT_FILE:
        return hashlib.sha256(timeless(opened.artifact)).hexdigest()
    with opened.path(name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_id(opened: OpenArtifact, files: dict[str, FileRecord]) -> None:
    content = artifact_id(opened.artifact, files)
    for name, stated in (
        (MANIFEST_FILE, opened.manifest.artifact_id),
        (ARTIFACT_FILE, opened.artifact.metadata.artifact_id),
    ):
        if stated != content:
            raise _damaged(f"artifact_id in {name} is {stated:.16}..., by content {content:.16}...", opened.path(name))


# What the artifact says


def _check_references(opened: OpenArtifact) -> None:
    """Files and programs that artifact.json names are there."""
    artifact, where = opened.artifact, opened.directory / ARTIFACT_FILE
    programs = [program.file for program in artifact.programs.values()]
    parameters = [file for group in artifact.parameters for file in group.files]
    for file in programs + parameters:
        if file not in opened.manifest.files:
            raise _damaged(f"{ARTIFACT_FILE} names {file!r}, which is not in {MANIFEST_FILE}", where)
    # What lies in params/ is not hashed at every opening, so no program may.
    misplaced = [file for file in programs if _is_parameters(file)]
    misplaced += [file for file in parameters if not _is_parameters(file)]
    for file in misplaced:
        raise _damaged(f"{ARTIFACT_FILE} names {file!r} for what it is not by its directory", where)
    for pipeline in artifact.pipelines:
        for supertask in pipeline.supertasks:
            if supertask.kind == "comp" and supertask.program not in artifact.programs:
                raise _damaged(f"pipeline {pipeline.name!r} runs unknown program {supertask.program!r:.80}", where)


def _check_host(opened: OpenArtifact) -> None:
    """The programs can run here. (Loading does not tell: a wrong instruction set kills the process later.)"""
    target, where = opened.artifact.target, str(opened.directory / ARTIFACT_FILE)
    if not host.supports(target.isa):
        raise UserError(
            f"the artifact's programs need instruction set {target.isa!r}, this is {host.host_isa()!r}",
            where=where,
            hint="build it for this machine, or use backend eager",
        )
    if target.torch in ("", "any"):
        return
    installed = _installed_torch()
    if _release(target.torch) != _release(installed):
        raise UserError(
            f"the artifact's programs need torch {target.torch}, and torch {installed} is installed",
            where=where,
            hint=f"pip install torch=={_release(target.torch)}, or build the artifact again",
        )


def _installed_torch() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "(none)"


def _release(torch_version: str) -> str:
    """Without the local part: `2.13.0+cpu` and `2.13.0` load the same programs."""
    return torch_version.partition("+")[0]
