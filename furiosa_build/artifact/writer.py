"""Publishes an artifact: every file in place first, then one rename; `latest` moves by another."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from furiosa_build.artifact.schema import ARTIFACT_FILE, MANIFEST_FILE, Artifact, Manifest, timeless
from furiosa_build.errors import UserError
from furiosa_build.store.blobs import place

LATEST = "latest"

_VERSION = re.compile(r"[0-9a-f]{12}")


def version_of(artifact_id: str) -> str:
    """The name of an artifact's directory: the first 12 digits of its id."""
    return artifact_id[:12]


def check_is_directory(path: Path, where: str) -> None:
    """Raises UserError when `path` is no directory and cannot become one. `where`: the option that names it."""
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        hint = "choose another directory, or move what is there"
        raise UserError(f"{nearest} exists and is not a directory", where=where, hint=hint)


def check_destination(directory: Path) -> None:
    """Raises UserError when `directory` (SAVE_DIR/NAME) holds anything that this project did not write."""
    check_is_directory(directory, "save_dir, name")
    if not directory.exists():
        return
    hint = "choose another save_dir or name, or move what is there"
    for entry in directory.iterdir():
        ours = (
            entry.is_symlink()
            if entry.name == LATEST
            else entry.name.startswith(".") or entry.name.endswith(".qualify.json") or _is_version(entry)
        )
        if not ours:
            raise UserError(
                f"the output directory {directory} exists and is not one of artifacts: it holds {entry.name!r}",
                where="save_dir, name",
                hint=hint,
            )


def is_published(directory: Path, manifest: Manifest) -> bool:
    """Whether `directory` holds this artifact: its two JSON files, all others with their sizes, and no more."""
    try:
        if Manifest.model_validate_json((directory / MANIFEST_FILE).read_bytes()) != manifest:
            return False
        artifact = Artifact.model_validate_json((directory / ARTIFACT_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    found = {
        path.relative_to(directory).as_posix(): path.lstat().st_size
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    found[ARTIFACT_FILE] = len(timeless(artifact))
    del found[MANIFEST_FILE]
    sizes = {path: record.size for path, record in manifest.files.items()}
    stated = manifest.files[ARTIFACT_FILE].sha256
    return found == sizes and hashlib.sha256(timeless(artifact)).hexdigest() == stated


def publish(directory: Path, artifact: Artifact, manifest: Manifest, files: Mapping[str, Path]) -> None:
    """Makes `directory` (SAVE_DIR/NAME/VERSION) this artifact, stamped with the time.

    `files` maps each path of the manifest but artifact.json to the file to be linked there. What stood there before, an
    artifact that has been damaged, is replaced.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        for path in manifest.files:
            if path != ARTIFACT_FILE:
                place(files[path], staging / path)
        stamped = artifact.model_dump(mode="json")
        stamped["metadata"]["timestamp"] = int(time.time())
        _write(staging / ARTIFACT_FILE, json.dumps(stamped, indent=1, sort_keys=True, ensure_ascii=False))
        _write(staging / MANIFEST_FILE, manifest.model_dump_json(indent=1))
        staging.chmod(0o755)
        if directory.exists():
            damaged = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.damaged."))
            directory.rename(damaged / "artifact")
            shutil.rmtree(damaged)
        try:
            staging.rename(directory)
        except OSError:
            # Another build of the same artifact was faster.
            if not is_published(directory, manifest):
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def point_latest_to(directory: Path) -> None:
    """Makes `latest`, beside `directory`, a link to it."""
    link = directory.parent / f".{LATEST}.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(directory.name)
    link.replace(directory.parent / LATEST)


def latest_is(directory: Path) -> bool:
    """Whether `latest` points to `directory`."""
    link = directory.parent / LATEST
    return link.is_symlink() and str(link.readlink()) == directory.name


def _is_version(path: Path) -> bool:
    """By its name: one that has lost files is still ours, and will be replaced."""
    return _VERSION.fullmatch(path.name) is not None and path.is_dir()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
