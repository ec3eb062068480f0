"""Publishes an artifact: every file in place first, then one rename; `latest` moves by another."""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from furiosa_build.artifact.schema import MANIFEST_FILE, SIGNATURE_FILE, TIMESTAMP_FILE, Manifest, Timestamp, to_json
from furiosa_build.core.errors import UserError
from furiosa_build.core.failpoints import reach
from furiosa_build.core.files import link_or_copy, sync

LATEST = "latest"

_VERSION = re.compile(r"[0-9a-f]{12}")


def version_of(artifact_id: str) -> str:
    """The name of an artifact's directory: the first 12 digits of its id."""
    return artifact_id[:12]


def check_is_directory(path: Path, where: str) -> None:
    """Raises UserError when `path` is not a directory and cannot become one. `where`: the option that names it."""
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
            else entry.name.startswith(".")
            or entry.name.endswith((".qualify.json", ".build-report.json", ".build-report.html"))
            or _is_version(entry)
        )
        if not ours:
            raise UserError(
                f"the output directory {directory} exists and is not one of artifacts: it holds {entry.name!r}",
                where="save_dir, name",
                hint=hint,
            )


def is_published(directory: Path, manifest: Manifest, sha256_of: Callable[[Path], str]) -> bool:
    """Whether `directory` holds this artifact, whole, and no more. `sha256_of` may remember."""
    try:
        return next(damaged_files(directory, manifest, sha256_of), None) is None
    except OSError:  # another build replaces it at this moment
        return False


def damaged_files(directory: Path, manifest: Manifest, sha256_of: Callable[[Path], str]) -> Iterator[str]:
    """The files of `directory` that are not those of this artifact; missing ones and such as are too many as well."""
    found = {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    if not _holds(directory / MANIFEST_FILE, to_json(manifest)):
        yield MANIFEST_FILE
    if _published_at(directory, manifest) is None:
        yield TIMESTAMP_FILE
    yield from sorted(found - {*manifest.files, MANIFEST_FILE, TIMESTAMP_FILE, SIGNATURE_FILE})
    for name, record in manifest.files.items():
        path = directory / name
        try:
            is_whole = not path.is_symlink() and path.stat().st_size == record.size and sha256_of(path) == record.sha256
        except OSError:
            is_whole = False
        if not is_whole:
            yield name


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


def _published_at(directory: Path, manifest: Manifest) -> int | None:
    try:
        data = (directory / TIMESTAMP_FILE).read_bytes()
        timestamp = Timestamp.model_validate_json(data).timestamp
    except (OSError, ValueError):
        return None
    return timestamp if data == to_json(Timestamp.of(manifest.artifact_id, timestamp)) else None


def publish(
    directory: Path,
    manifest: Manifest,
    files: Mapping[str, Path],
    sha256_of: Callable[[Path], str],
    remember: Callable[[Path, str], None],
) -> bool:
    """Makes `directory` (SAVE_DIR/NAME/VERSION) this artifact, stamped with the time.

    What stood there before is replaced. A signature stays if it is of the same manifest (other files were damaged).
    Returns whether one was removed, which would not be valid any more.

    Args:
        directory: Where.
        manifest: What.
        files: Every path of the manifest, and the file to be linked there.
        sha256_of: sha256 of a file; may remember.
        remember: Told the sha256 of each file that is a link.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(directory.parent)
    staging = _new_directory(directory)
    try:
        for path in manifest.files:
            link_or_copy(files[path], staging / path)
            reach("mid-publish")
        published_at = _published_at(directory, manifest)
        stamp = Timestamp.of(manifest.artifact_id, published_at or int(time.time()))
        _write(staging / TIMESTAMP_FILE, to_json(stamp))
        _write(staging / MANIFEST_FILE, to_json(manifest))
        was_signed = (directory / SIGNATURE_FILE).is_file()
        stays_signed = was_signed and published_at is not None and _holds(directory / MANIFEST_FILE, to_json(manifest))
        if stays_signed:
            link_or_copy(directory / SIGNATURE_FILE, staging / SIGNATURE_FILE)
        for made in (path for path in (staging, *staging.rglob("*")) if path.is_dir()):
            sync(made)
        if directory.exists() and not is_published(directory, manifest, sha256_of):
            damaged = _new_directory(directory)
            with suppress(FileNotFoundError):  # another build of the same artifact was faster
                directory.rename(damaged / "damaged")
            shutil.rmtree(damaged)
        reach("before-publish")
        try:
            staging.rename(directory)
        except OSError:
            # Another build of the same artifact was faster.
            if not is_published(directory, manifest, sha256_of):
                raise
        reach("after-publish")
        sync(directory.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    with suppress(FileNotFoundError):  # another build replaces it at this moment
        for path, record in manifest.files.items():
            if (directory / path).samefile(files[path]):
                remember(directory / path, record.sha256)
    return was_signed and not stays_signed


def _new_directory(beside: Path) -> Path:
    """A hidden directory, named for this process."""
    path = _hidden(beside)
    path.mkdir()
    return path


def _hidden(beside: Path) -> Path:
    """A new hidden name, which tells of this process: see `_remove_leftovers`."""
    return beside.parent / f".{beside.name}.{platform.node()}.{os.getpid()}.{secrets.token_hex(4)}"


def _remove_leftovers(parent: Path) -> None:
    """Removes what processes of this machine have left that were killed while they published."""
    for path in parent.glob(f".*.{platform.node()}.*.*"):
        process = path.name.split(".")[-2]
        if process.isdecimal() and not _is_running(int(process)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink(True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def qualification_file(directory: Path) -> Path:
    """Where the figures stand that the artifact in `directory` has qualified with: beside it."""
    return directory.with_suffix(".qualify.json")


def write_qualification(directory: Path, figures: bytes) -> None:
    """Puts the figures of the artifact in `directory` in their place, whole or not at all."""
    file = qualification_file(directory)
    new = _hidden(file)
    try:
        _write(new, figures)
        new.replace(file)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def point_latest_to(directory: Path) -> None:
    """Makes `latest`, beside `directory`, a link to it."""
    _remove_leftovers(directory.parent)
    latest = directory.parent / LATEST
    link = _hidden(latest)
    link.symlink_to(directory.name)
    try:
        reach("before-latest")
        link.replace(latest)
    except OSError:
        link.unlink()
        raise


def latest_is(directory: Path) -> bool:
    """Whether `latest` points to `directory`."""
    link = directory.parent / LATEST
    return link.is_symlink() and str(link.readlink()) == directory.name


def _is_version(path: Path) -> bool:
    """Whether its name is that of a version. One that has lost files is still ours, and will be replaced."""
    return _VERSION.fullmatch(path.name) is not None and path.is_dir()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
