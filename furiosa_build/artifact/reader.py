"""Opens an artifact and makes sure that it is whole, unchanged and runnable here, before anything uses it.

Nothing of the artifact is trusted: sizes are limited before parsing, and no path is followed out of its
directory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from furiosa_build.artifact.schema import (
    ARTIFACT_FILE,
    DRAFT_DIRECTORY,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    SIGNATURE_FILE,
    TIMESTAMP_FILE,
    Artifact,
    Manifest,
    Record,
    Timestamp,
    artifact_id,
    to_json,
)
from furiosa_build.backends.registry import find_backend
from furiosa_build.backends.target import Target
from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.core.errors import UserError
from furiosa_build.core.safetensors_header import check_safetensors
from furiosa_build.core.text import path_text

_MAX_JSON_BYTES = 32 * 2**20
_MAX_JSON_DEPTH = 64
_PARAMETERS = ("params/", f"{DRAFT_DIRECTORY}params/")

_R = TypeVar("_R", bound=Record)


@dataclass(frozen=True)
class OpenArtifact:
    """A verified artifact. `directory` is absolute, with symbolic links such as `latest` resolved."""

    directory: Path
    artifact: Artifact
    manifest: Manifest

    @property
    def draft(self) -> OpenArtifact | None:
        """The draft model's part; None if it has none."""
        draft = self.artifact.draft
        return None if draft is None else OpenArtifact(self.directory, draft, self.manifest)

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
        UserError: It is not an artifact, is damaged, is of another schema version, or cannot run on this machine.
            One message, which names the file.
    """
    directory = artifact_directory(path)
    try:
        for problem in _problems(directory, verify):
            raise problem
        opened = _read_all(directory)
        path_text(directory)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}", where=str(error.filename or path)) from error
    for model in (opened, opened.draft):
        if model is not None:
            _check_host(model)
    return opened


def find_damage(path: str | Path) -> list[UserError]:
    """Everything that is wrong with the artifact in directory `path`, each file by its name; every byte is read.

    Raises UserError when it is not an artifact at all.
    """
    directory = artifact_directory(path)
    try:
        found = list(_problems(directory, "full"))
        if not found:
            _read_all(directory)
    except UserError as error:
        return [error]
    except OSError as error:
        return [UserError(f"{path} cannot be read: {error}", where=str(error.filename or path))]
    return found


def find_artifact(path: str | Path) -> Path | None:
    """The directory of the artifact at `path`, which may be a link, or the save_dir of one artifact; else None."""
    directory = Path(os.path.realpath(path))
    if _has_artifact(directory):
        return directory
    inside = _saved_in(directory)
    return Path(os.path.realpath(inside[0])) if len(inside) == 1 else None


def artifact_directory(path: str | Path) -> Path:
    """What `find_artifact` finds. Raises UserError when it finds nothing."""
    if (found := find_artifact(path)) is not None:
        return found
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"{path} is not a directory", where=str(path), valid="the directory of an artifact")
    if several := _saved_in(directory):
        raise UserError(f"{path} has several artifacts", where=str(path), valid=", ".join(map(str, several)))
    hint = f"did you mean {path}/latest?" if _has_artifact(directory / "latest") else ""
    raise UserError(f"{path} is not an artifact: it has no {ARTIFACT_FILE}", where=str(path), hint=hint)


def _has_artifact(directory: Path) -> bool:
    return any((directory / name).exists() for name in (ARTIFACT_FILE, MANIFEST_FILE))


def _saved_in(directory: Path) -> list[Path]:
    """The latest artifacts of a save_dir."""
    return [latest for latest in sorted(directory.glob("*/latest")) if _has_artifact(latest)]


def _problems(directory: Path, verify: Literal["fast", "full"]) -> Iterator[UserError]:
    """What differs from manifest.json, or is not safe to be opened."""
    try:
        _check_links(directory)
        if not (directory / MANIFEST_FILE).exists():
            raise _damaged(f"{MANIFEST_FILE} is missing", directory / MANIFEST_FILE)
        manifest = _read(directory / MANIFEST_FILE, Manifest)
        _check_names(directory, manifest)
    except UserError as error:
        yield error
        # Without a manifest, at least those that can be told by themselves.
        for name, record in ((ARTIFACT_FILE, Artifact), (TIMESTAMP_FILE, Timestamp)):
            try:
                _read(directory / name, record)
            except UserError as other:
                yield other
            except OSError:
                yield _damaged(f"{name} is missing", directory / name)
        return
    broken = {}
    for name, misplaced in _misplaced_files(directory, manifest):
        broken[name] = misplaced
        yield misplaced
    for name in manifest.files:
        if name not in broken and (problem := _content_problem(directory, manifest, name, verify)) is not None:
            yield problem
    if TIMESTAMP_FILE not in broken and (problem := _timestamp_problem(directory, manifest)) is not None:
        yield problem


def _read_all(directory: Path) -> OpenArtifact:
    """The files are as the manifest says; what they say must fit together as well."""
    manifest = _read(directory / MANIFEST_FILE, Manifest)
    artifact = _read(directory / ARTIFACT_FILE, Artifact)
    time = _read(directory / TIMESTAMP_FILE, Timestamp).timestamp
    opened = OpenArtifact(
        directory,
        artifact.model_copy(update={"metadata": artifact.metadata.model_copy(update={"timestamp": time})}),
        manifest,
    )
    _check_references(opened)
    if opened.draft is not None:
        _check_references(opened.draft, DRAFT_DIRECTORY)
        _check_draft(opened)
    _check_id(opened)
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
        read = record.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _damaged(f"{path.name}: {place}: {first['msg']}", path) from error
    if path.read_bytes() != to_json(read):  # so that no changed byte goes unnoticed where there is no digest
        raise _damaged(f"{path.name} is not written as {record.__name__} is", path)
    return read


def _parse(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise _damaged(f"{path.name} has {size} bytes, more than {_MAX_JSON_BYTES}", path)
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_each_key_once)
        depth = _depth(value)
        canonical_json(value)  # refuses what JSON has no form for, such as NaN, 1e999 and half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise _damaged(f"{path.name} is not valid JSON: {error}", path) from error
    if not isinstance(value, dict):
        raise _damaged(f"{path.name} is not a JSON object", path)
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
    """Checks, before any file is opened, that all are regular files or links to such within the directory."""
    for path in _walk(directory):
        name = path.relative_to(directory)
        if not Path(os.path.realpath(path)).is_relative_to(directory):
            raise _damaged(f"{name} is a link out of the artifact", path)
        if not path.is_file():
            raise _damaged(f"{name} is not a regular file", path)


def _walk(directory: Path) -> Iterable[Path]:
    """All that is not a real directory, in order."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path)


def _check_names(directory: Path, manifest: Manifest) -> None:
    """Checks the names in the manifest, before any of these files is opened."""
    manifest_path = directory / MANIFEST_FILE
    for name in manifest.files:
        if not _stays_inside(name):
            raise _damaged(f"{MANIFEST_FILE} lists {name!r}, which is not a plain path in the artifact", manifest_path)
    if ARTIFACT_FILE not in manifest.files:
        raise _damaged(f"{MANIFEST_FILE} does not list {ARTIFACT_FILE}", manifest_path)


def _misplaced_files(directory: Path, manifest: Manifest) -> Iterator[tuple[str, UserError]]:
    """The manifest lists what there is, no more and no less, in its right size."""
    found = {path.relative_to(directory).as_posix() for path in _walk(directory)}
    expected = {*manifest.files, MANIFEST_FILE, TIMESTAMP_FILE}
    for name in sorted(expected - found):
        yield name, _damaged(f"{name} is missing", directory / name)
    for name in sorted(found - expected - {SIGNATURE_FILE}):
        yield name, _damaged(f"{name} is not in {MANIFEST_FILE}", directory / name)
    for name in sorted(manifest.files.keys() & found):
        size, stated = (directory / name).stat().st_size, manifest.files[name].size
        if size != stated:
            yield name, _damaged(f"{name} has {size} bytes, {stated} by {MANIFEST_FILE}", directory / name)


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = path.as_posix() == name and "\\" not in name and "\0" not in name
    return plain and not path.is_absolute() and name != "." and ".." not in path.parts


def _content_problem(
    directory: Path, manifest: Manifest, name: str, verify: Literal["fast", "full"]
) -> UserError | None:
    path = directory / name
    if _is_parameters(name):
        try:
            check_safetensors(path)
        except UserError as error:
            return error
        if verify == "fast":
            return None
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != manifest.files[name].sha256:
        return _damaged(f"the sha256 of {name} is not that of {MANIFEST_FILE}", path)
    return None


def _timestamp_problem(directory: Path, manifest: Manifest) -> UserError | None:
    path = directory / TIMESTAMP_FILE
    try:
        found = _read(path, Timestamp)
    except UserError as error:
        return error
    if found != Timestamp.of(manifest.artifact_id, found.timestamp):
        return _damaged(f"{TIMESTAMP_FILE} is not of this artifact, or was changed", path)
    return None


def _is_parameters(name: str) -> bool:
    return name.startswith(_PARAMETERS)


def _check_id(opened: OpenArtifact) -> None:
    files = opened.manifest.files
    if (draft := opened.artifact.draft) is not None:
        stated = draft.metadata.artifact_id
        content = artifact_id(draft, {name: r for name, r in files.items() if name.startswith(DRAFT_DIRECTORY)})
        if stated != content:
            where = opened.path(ARTIFACT_FILE)
            raise _damaged(f"artifact_id of the draft is {stated:.16}..., by content {content:.16}...", where)
    content = artifact_id(opened.artifact, files)
    for name, stated in (
        (MANIFEST_FILE, opened.manifest.artifact_id),
        (ARTIFACT_FILE, opened.artifact.metadata.artifact_id),
    ):
        if stated != content:
            raise _damaged(f"artifact_id in {name} is {stated:.16}..., by content {content:.16}...", opened.path(name))


# What the artifact says


def _check_draft(opened: OpenArtifact) -> None:
    """The draft fits the model that it is for. (Without a draft, `num_speculative_tokens` says nothing.)"""
    artifact, where = opened.artifact, opened.directory / ARTIFACT_FILE
    draft = artifact.draft
    assert draft is not None
    if draft.draft is not None:
        raise _damaged(f"the draft in {ARTIFACT_FILE} has a draft itself", where)
    if artifact.generator_config.num_speculative_tokens is None:
        raise _damaged(f"{ARTIFACT_FILE} has a draft and no num_speculative_tokens", where)
    if artifact.generator_config.calculate_logit_only_for_last_token:
        raise _damaged(f"{ARTIFACT_FILE} has a draft, and the logits of the last token only to verify it by", where)
    own, others = artifact.model_metadata.vocab_size, draft.model_metadata.vocab_size
    if own != others:
        raise _damaged(f"the draft in {ARTIFACT_FILE} has a vocabulary of {others} tokens, the model of {own}", where)


def _check_references(opened: OpenArtifact, directory: str = "") -> None:
    """Files and programs that artifact.json names are there; those of the draft are in its `directory`."""
    artifact, where = opened.artifact, opened.directory / ARTIFACT_FILE
    programs = [program.file for program in artifact.programs.values()]
    programs += [] if artifact.library is None else [artifact.library]
    parameters = [file for group in artifact.parameters for file in group.files]
    for file in programs + parameters:
        if file not in opened.manifest.files:
            raise _damaged(f"{ARTIFACT_FILE} names {file!r}, which is not in {MANIFEST_FILE}", where)
    # What lies in params/ is not hashed at every opening, so no program may.
    misplaced = [file for file in programs if _is_parameters(file) or not file.startswith(directory)]
    misplaced += [file for file in parameters if not file.startswith(f"{directory}params/")]
    for file in misplaced:
        raise _damaged(f"{ARTIFACT_FILE} names {file!r} for what it is not by its directory", where)
    for pipeline in artifact.pipelines:
        for supertask in pipeline.supertasks:
            if supertask.kind == "comp" and supertask.program not in artifact.programs:
                raise _damaged(f"pipeline {pipeline.name!r} runs unknown program {supertask.program!r:.80}", where)


def _check_host(opened: OpenArtifact) -> None:
    """The programs can run here, as far as their backend can tell; loading refuses those of one that is not there."""
    backend = find_backend(opened.artifact.backend)
    if backend is not None:
        target = opened.artifact.target
        backend.check_host(Target(target.isa, target.torch), str(opened.directory / ARTIFACT_FILE))
