"""What a store holds, whether it is whole, and how it is made smaller."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from furiosa_build.errors import UserError
from furiosa_build.store.actions import ActionRecord, Store
from furiosa_build.store.guard import exclusive, locks_work
from furiosa_build.store.sessions import all_sessions, is_alive, pins


@dataclass(frozen=True)
class Entry:
    """A finished action, when it was last used (Unix seconds), and whether a build that runs uses it."""

    record: ActionRecord
    last_used: float
    pinned: bool

    @property
    def size(self) -> int:
        """Bytes of its outputs, some of which other actions may have as well."""
        return sum(output.size for output in self.record.outputs.values())


@dataclass(frozen=True)
class Collected:
    """What gc has removed, or would remove.

    Attributes:
        actions: They are found no more.
        leftovers: Files and directories: of removed actions and of builds that were killed.
        freed: Bytes of the leftovers. What an artifact links to stays on disk as long as the artifact does.
        kept: Bytes of the actions that stay.
    """

    actions: list[Entry]
    leftovers: list[Path]
    freed: int
    kept: int


def entries(store: Store) -> list[Entry]:
    """All actions, the one that was used last comes first."""
    pinned = _pinned(store.root)
    found = [Entry(record, used, record.key in pinned) for record, _, used in store.records()]
    return sorted(found, key=lambda entry: (-entry.last_used, entry.record.key))


def total_size(entries: Iterable[Entry]) -> int:
    """Bytes of what the actions hold together; what several of them hold counts once."""
    return sum({output.sha256: output.size for e in entries for output in e.record.outputs.values()}.values())


def verify(store: Store) -> Iterator[str]:
    """Reads every blob; yields a line for each thing that is not as it should be. The next build makes it again."""
    records = [record for record, _, _ in store.records()]
    users = {output.sha256: f"{r.step}/{name}" for r in records for name, output in r.outputs.items()}
    blobs = {path.name: path for path in _blob_files(store.root)}
    for sha256, path in blobs.items():
        if store.hashes.hash(path, anew=True) != sha256:
            yield f"damaged: {path} ({users.get(sha256, 'used by nothing')})"
    for sha256 in sorted(users.keys() - blobs.keys()):
        yield f"missing: {store.root / 'blobs' / sha256[:2] / sha256} ({users[sha256]})"
    readable = {record.key for record in records}
    for manifest in sorted(store.root.glob("actions/*/*/manifest.json")):
        if manifest.parent.name not in readable:
            yield f"unreadable: {manifest}"


def collect(
    store: Store, max_size: int | None = None, older_than: float | None = None, dry_run: bool = False
) -> Collected:
    """Removes what killed builds have left; actions not used for `older_than` seconds; then the longest unused ones
    until the store holds at most `max_size` bytes. What a running build uses stays.

    Raises UserError where locks do nothing: there it cannot be known whether a build runs.
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
        doomed = _doomed(found, max_size, older_than)
        removed = [entry for entry in found if entry.record.key in doomed]
        kept = [entry for entry in found if entry.record.key not in doomed]
        used = {output.sha256 for entry in kept for output in entry.record.outputs.values()}
        leftovers = _leftovers(store.root, used, older_than)
        freed = sum(_size(path) for path in leftovers)
        if not dry_run:
            for entry in removed:
                shutil.rmtree(store.root / "actions" / entry.record.key[:2] / entry.record.key)
            for path in leftovers:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            store.hashes.forget_missing()
        return Collected(removed, leftovers, freed, total_size(kept))


def _doomed(found: list[Entry], max_size: int | None, older_than: float | None) -> set[str]:
    """Keys of the actions to be removed."""
    now = time.time()
    doomed = {e.record.key for e in found if older_than is not None and not e.pinned and now - e.last_used > older_than}
    if max_size is None:
        return doomed
    kept = [entry for entry in found if entry.record.key not in doomed]
    users = Counter(output.sha256 for entry in kept for output in set(entry.record.outputs.values()))
    size = total_size(kept)
    for entry in reversed(kept):
        if size <= max_size:
            break
        if not entry.pinned:
            doomed.add(entry.record.key)
            for output in set(entry.record.outputs.values()):
                users[output.sha256] -= 1
                size -= output.size if users[output.sha256] == 0 else 0
    return doomed


def _leftovers(root: Path, used: set[str], older_than: float | None) -> list[Path]:
    """Files and directories that nothing needs."""
    sessions = all_sessions(root)
    ended = [directory for directory in sessions if not is_alive(directory)]
    found = [*ended, *(path for path in _blob_files(root) if path.name not in used)]
    found += [path for path in root.glob("actions/*/*/.*") if path.is_file()]
    found += [
        path.parent
        for path in root.glob("actions/*/*/key_factors.json")
        if not (path.parent / "manifest.json").exists()
    ]
    if len(ended) == len(sessions):  # no build holds a lock, or compiles
        found += [*root.glob("locks/*"), *root.glob("scratch/*")]
    logs = root / "logs"
    if older_than is not None and logs.is_dir():
        found += [path for path in logs.iterdir() if time.time() - path.stat().st_mtime > older_than]
    return sorted(found)


def _pinned(root: Path) -> set[str]:
    return {key for directory in all_sessions(root) if is_alive(directory) for key in pins(directory)}


def _blob_files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.glob("blobs/*/*")) if path.is_file())


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
    return path.lstat().st_size
