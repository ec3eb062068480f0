"""Listing, verifying and shrinking a store."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from furiosa_build.core.errors import UserError
from furiosa_build.store.actions import Store
from furiosa_build.store.locks import exclusive, locks_work, shared
from furiosa_build.store.records import MANIFEST, ActionRecord, read_action
from furiosa_build.store.sessions import all_sessions, is_alive, pins


@dataclass(frozen=True)
class Entry:
    """A finished action, when it was last used (Unix seconds), and whether a running build uses it."""

    record: ActionRecord
    last_used: float
    pinned: bool

    @property
    def size(self) -> int:
        """Bytes of its outputs, which it may share with other actions."""
        return sum(output.size for output in self.record.outputs.values())


@dataclass(frozen=True)
class Collected:
    """The result of gc: what it removed, or would remove.

    Attributes:
        actions: Removed actions.
        leftovers: Removed files and directories, of these actions and of builds that were killed.
        freed: Bytes of the leftovers. A file that an artifact links to stays on disk as long as the artifact does.
        kept: Bytes of the remaining actions.
    """

    actions: list[Entry]
    leftovers: list[Path]
    freed: int
    kept: int


def entries(store: Store) -> list[Entry]:
    """All actions, most recently used first."""
    pinned = _pinned(store.root)
    found = [Entry(record, used, record.key in pinned) for record, _, used in store.records()]
    return sorted(found, key=lambda entry: (-entry.last_used, entry.record.key))


def total_size(entries: Iterable[Entry]) -> int:
    """Bytes of all outputs of the actions; an output that several of them share counts once."""
    return sum({output.sha256: output.size for e in entries for output in e.record.outputs.values()}.values())


def verify(store: Store) -> Iterator[str]:
    """Reads every file; yields a line for each that is damaged or missing."""
    with shared(store.root):
        users: dict[str, str] = {}
        for directory in _finished(store.root):
            try:
                record, _ = read_action(directory)
                users |= {output.sha256: f"{record.step}: {name}" for name, output in record.outputs.items()}
            except FileNotFoundError as error:
                yield f"{error.filename} is missing"
            except (OSError, ValueError) as error:
                yield str(error)
        blobs = {path.name: path for path in _blob_files(store.root)}
        for sha256, path in blobs.items():
            try:
                if store.link_hashes.hash(path, anew=True) != sha256:
                    yield f"{path} is damaged ({users.get(sha256, 'used by nothing')})"
            except OSError as error:
                yield str(error)
        for sha256 in sorted(users.keys() - blobs.keys()):
            yield f"{store.root / 'blobs' / sha256[:2] / sha256} is missing ({users[sha256]})"


def collect(
    store: Store, max_size: int | None = None, older_than: float | None = None, dry_run: bool = False
) -> Collected:
    """Removes leftovers of killed builds and damaged actions, then actions not used for `older_than` seconds, then the
    least recently used ones until the store holds at most `max_size` bytes. What a running build uses stays.

    Raises UserError where locks do nothing, since running builds cannot be detected there.
    """
    if not store.root.is_dir():
        return Collected([], [], 0, 0)
    if not store.is_writable:
        raise UserError("the store cannot be written", where=str(store.root))
    if not locks_work(store.root):
        raise UserError(
            "locks do nothing on the store's file system, so gc cannot tell what builds are using",
            where=str(store.root),
            hint="delete the store when no build runs; docs/cache.md says what is safe to delete",
        )
    with exclusive(store.root):
        found = entries(store)
        expired = _to_remove(found, max_size, older_than)
        removed = [entry for entry in found if entry.record.key in expired]
        kept = [entry for entry in found if entry.record.key not in expired]
        leftovers = _leftovers(store.root, found, kept, older_than)
        freed = sum(_size(path) for path in leftovers)
        if not dry_run:
            for entry in removed:
                shutil.rmtree(store.root / "actions" / entry.record.key[:2] / entry.record.key)
            for path in leftovers:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            store.hashes.forget_missing()
        return Collected(removed, leftovers, freed, total_size(kept))


def _to_remove(found: list[Entry], max_size: int | None, older_than: float | None) -> set[str]:
    """Keys of the actions to be removed."""
    now = time.time()
    expired = {
        e.record.key for e in found if older_than is not None and not e.pinned and now - e.last_used > older_than
    }
    if max_size is None:
        return expired
    kept = [entry for entry in found if entry.record.key not in expired]
    users = Counter(output.sha256 for entry in kept for output in set(entry.record.outputs.values()))
    size = total_size(kept)
    for entry in reversed(kept):
        if size <= max_size:
            break
        if not entry.pinned:
            expired.add(entry.record.key)
            for output in set(entry.record.outputs.values()):
                users[output.sha256] -= 1
                size -= output.size if users[output.sha256] == 0 else 0
    return expired


def _leftovers(root: Path, found: list[Entry], kept: list[Entry], older_than: float | None) -> list[Path]:
    """Files and directories that are no longer needed, besides the directories of removed actions."""
    sessions = all_sessions(root)
    ended = [directory for directory in sessions if not is_alive(directory)]
    pinned, whole = _pinned(root), {entry.record.key for entry in found}
    leftovers = [*ended, *(path for path in root.glob("actions/*/*") if path.name not in whole | pinned)]
    remaining = {entry.record.key for entry in kept}
    leftovers += [path for path in root.glob("actions/*/*/.*") if path.parent.name in remaining]
    if pinned <= whole:  # otherwise a build uses an action that was damaged since: which blobs, is unknown
        used = {output.sha256 for entry in kept for output in entry.record.outputs.values()}
        leftovers += [path for path in _blob_files(root) if path.name not in used]
    if len(ended) == len(sessions):  # no build holds a lock, or compiles
        leftovers += [*root.glob("locks/*"), *root.glob("scratch/*")]
    logs = root / "logs"
    if older_than is not None and logs.is_dir():
        leftovers += [path for path in logs.iterdir() if time.time() - path.stat().st_mtime > older_than]
    return sorted(leftovers)


def _pinned(root: Path) -> set[str]:
    return {key for directory in all_sessions(root) if is_alive(directory) for key in pins(directory)}


def _finished(root: Path) -> list[Path]:
    return [manifest.parent for manifest in sorted(root.glob(f"actions/*/*/{MANIFEST}"))]


def _blob_files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.glob("blobs/*/*")) if path.is_file())


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
    return path.lstat().st_size
