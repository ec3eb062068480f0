"""What is in a store, whether it is whole, and what goes when it is to become smaller."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from furiosa_build.core.canonical_json import digest
from furiosa_build.core.errors import UserError
from furiosa_build.store import ActionResult, Store, gc

LONG_AGO = 1_000_000_000


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def key_of(step: str) -> str:
    return digest({"step": step})


def add(store: Store, step: str, files: Mapping[str, str], last_used: float | None = None) -> None:
    """An action of a build that has ended."""

    def work(output: Path) -> ActionResult:
        for name, text in files.items():
            (output / name).write_text(text)
        return ActionResult()

    with_session = Store(store.root)
    with_session.get_or_run(key_of(step), step, {"step": step}, work)
    with_session.close()
    if last_used is not None:
        os.utime(directory_of(store, step) / "manifest.json", (last_used, last_used))


def directory_of(store: Store, step: str) -> Path:
    return store.root / "actions" / key_of(step)[:2] / key_of(step)


def steps(store: Store) -> list[str]:
    return [entry.record.step for entry in gc.entries(store)]


def files(store: Store) -> set[str]:
    return {path.relative_to(store.root).as_posix() for path in store.root.rglob("*") if not path.is_dir()}


# What is there


def test_the_last_used_comes_first(store: Store) -> None:
    for step, used in (("a", 2), ("b", 3), ("c", 1)):
        add(store, step, {"f": step}, LONG_AGO + used)
    assert steps(store) == ["b", "a", "c"]
    found = Store(store.root).find(key_of("c"))
    assert found is not None
    assert steps(store) == ["c", "b", "a"], "to find it is to use it"


def test_what_several_actions_hold_counts_once(store: Store) -> None:
    add(store, "a", {"f": "same", "g": "a"})
    add(store, "b", {"f": "same"})
    assert [entry.size for entry in sorted(gc.entries(store), key=lambda e: e.record.step)] == [5, 4]
    assert gc.total_size(gc.entries(store)) == 5


def test_a_store_that_is_not_there_is_empty_and_stays_so(store: Store) -> None:
    assert gc.entries(store) == []
    assert list(gc.verify(store)) == []
    assert gc.collect(store, max_size=0) == gc.Collected([], [], 0, 0)
    assert not store.root.exists()


# Whether it is whole


def overwrite(content: bytes) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.chmod(0o644)
        path.write_bytes(content)

    return spoil


SPOILT = {
    "blob damaged": ("blobs/*/*", overwrite(b"?"), "is damaged (a: f)"),
    "blob cut short": ("blobs/*/*", overwrite(b""), "is damaged (a: f)"),
    "blob missing": ("blobs/*/*", Path.unlink, "is missing (a: f)"),
    "manifest damaged": ("actions/*/*/manifest.json", overwrite(b"{}"), "is damaged"),
    "factors damaged": ("actions/*/*/key_factors.json", overwrite(b"{}"), "is damaged"),
    "factors missing": ("actions/*/*/key_factors.json", Path.unlink, "No such file"),
}


@pytest.mark.parametrize(("pattern", "spoil", "words"), SPOILT.values(), ids=SPOILT)
def test_verify_names_what_is_not_whole(store: Store, pattern: str, spoil: Callable[[Path], None], words: str) -> None:
    add(store, "a", {"f": "a"})
    assert list(gc.verify(store)) == []
    (path,) = store.root.glob(pattern)
    spoil(path)
    findings = list(gc.verify(Store(store.root)))
    assert findings
    assert str(path) in findings[0]
    assert words.replace("No such file", "is missing") in findings[0]


def test_verify_reads_what_looks_unchanged(store: Store) -> None:
    add(store, "a", {"f": "a"})
    (path,) = store.root.glob("blobs/*/*")
    before = path.stat().st_mtime_ns
    overwrite(b"?")(path)
    os.utime(path, ns=(before, before))
    assert len(list(gc.verify(store))) == 1


def test_what_a_killed_build_leaves_is_no_damage(store: Store) -> None:
    add(store, "a", {"f": "a"})
    (directory_of(store, "a") / "manifest.json").unlink()
    (directory_of(store, "a") / ".manifest.json.abc").write_text("half of i")
    assert list(gc.verify(store)) == []


# Making it smaller


def test_without_a_wish_only_leftovers_go(store: Store) -> None:
    add(store, "a", {"f": "a"}, LONG_AGO)
    whole = files(store)
    add(store, "b", {"g": "b"})
    (directory_of(store, "b") / "manifest.json").unlink()  # killed before the rename
    leftovers = [
        "actions/ab/abc/.key_factors.json.xyz",
        f"actions/{key_of('a')[:2]}/{key_of('a')}/.manifest.json.xyz",
        "sessions/1-killed/lock",
        "sessions/1-killed/staged/f",
        "sessions/2-killed-before-its-lock/f",
        "scratch/inductor/cache",
        "locks/abc",
    ]
    for name in leftovers:
        (store.root / name).parent.mkdir(parents=True, exist_ok=True)
        (store.root / name).write_text("x")
    (store.root / "actions" / "ab" / "nothing-in-it").mkdir()
    assert gc.collect(store).actions == []
    assert files(store) == {name for name in whole if not name.startswith("locks/")}
    assert [path for path in store.root.rglob("*") if path.name in ("nothing-in-it", "1-killed")] == []


def test_a_dry_run_says_the_same_and_removes_nothing(store: Store) -> None:
    for age, step in enumerate("ab"):
        add(store, step, {"f": step * 100}, LONG_AGO - age)
    (store.root / "sessions" / "1-killed").mkdir()
    before = files(store)
    would = gc.collect(store, max_size=100, dry_run=True)
    assert files(store) == before
    done = gc.collect(store, max_size=100)
    assert [entry.record.step for entry in would.actions] == [entry.record.step for entry in done.actions] == ["b"]
    assert (would.leftovers, would.freed, would.kept) == (done.leftovers, done.freed, done.kept)
    assert done.kept == 100
    assert done.freed >= 100


def test_older_than_goes_by_the_last_use(store: Store) -> None:
    add(store, "old", {"f": "old"}, LONG_AGO)
    add(store, "used again", {"f": "used"}, LONG_AGO)
    add(store, "new", {"f": "new"})
    reader = Store(store.root)
    reader.find(key_of("used again"))
    reader.close()
    (store.root / "logs").mkdir()
    for name, used in (("old.log", LONG_AGO), ("new.log", None)):
        (store.root / "logs" / name).touch()
        if used is not None:
            os.utime(store.root / "logs" / name, (used, used))
    gc.collect(store, older_than=3600)
    assert sorted(steps(store)) == ["new", "used again"]
    assert [path.name for path in (store.root / "logs").iterdir()] == ["new.log"]


def test_what_an_action_that_stays_holds_stays(store: Store) -> None:
    add(store, "old", {"f": "shared", "g": "own"}, LONG_AGO)
    add(store, "new", {"f": "shared"})
    gc.collect(store, older_than=3600)
    assert Store(store.root).find(key_of("new")) is not None
    assert len(list(store.root.glob("blobs/*/*"))) == 1


def test_what_artifacts_link_to_stays_there(store: Store, tmp_path: Path) -> None:
    add(store, "a", {"f": "a"})
    (path,) = store.root.glob("blobs/*/*")
    (tmp_path / "artifact").hardlink_to(path)
    gc.collect(store, max_size=0)
    assert not path.exists()
    assert (tmp_path / "artifact").read_text() == "a"


@pytest.mark.parametrize("file", ["manifest.json", "key_factors.json"])
def test_a_damaged_action_goes(store: Store, file: str) -> None:
    """Or verify would complain of it for ever: its recipe may never be built again."""
    add(store, "a", {"f": "a"})
    overwrite(b"{")(directory_of(store, "a") / file)
    gc.collect(store)
    assert list(gc.verify(store)) == []
    assert not directory_of(store, "a").exists()
    assert list(store.root.glob("blobs/*/*")) == []


# Beside builds


def test_what_a_running_build_uses_stays(store: Store) -> None:
    add(store, "found", {"f": "found"}, LONG_AGO)
    add(store, "other", {"f": "other"}, LONG_AGO)
    building = Store(store.root)
    building.find(key_of("found"))
    with building._session.staging() as staged:
        building.get_or_run(
            key_of("made"), "made", {"step": "made"}, lambda output: void((output / "f").write_text("m"))
        )
        (staged / "f").write_text("half")
        scratch = building.scratch("tool") / "cache"
        scratch.parent.mkdir(parents=True)
        scratch.touch()
        assert {entry.record.step for entry in gc.entries(store) if entry.pinned} == {"found", "made"}
        gone = gc.collect(store, max_size=0, older_than=0)
        assert [entry.record.step for entry in gone.actions] == ["other"]
        assert (staged / "f").read_text() == "half"
        assert scratch.exists()
    assert building.find(key_of("found")) is not None
    assert building.find(key_of("made")) is not None
    building.close()
    gc.collect(store, max_size=0)
    assert steps(store) == []


@pytest.mark.parametrize("file", ["manifest.json", "key_factors.json"])
def test_the_blobs_of_an_action_that_was_damaged_while_a_build_uses_it_stay(store: Store, file: str) -> None:
    add(store, "a", {"f": "a"})
    building = Store(store.root)
    record = building.find(key_of("a"))
    assert record is not None
    overwrite(b"{")(directory_of(store, "a") / file)
    gc.collect(store, max_size=0)
    assert building.path(record.outputs["f"]).read_text() == "a"
    building.close()
    gc.collect(store)
    assert list(store.root.glob("blobs/*/*")) == []


def test_gc_waits_for_a_commit_and_a_commit_for_gc(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the blobs' coming in and the manifest that names them, they are nobody's."""
    add(store, "a", {"f": "a"})
    held = []
    adopt = store._blobs.adopt

    def look(file: Path, sha256: str | None = None) -> tuple[str, int]:
        with (store.root / "gc.lock").open() as guard:
            for kind in (fcntl.LOCK_SH, fcntl.LOCK_EX):
                try:
                    fcntl.flock(guard, kind | fcntl.LOCK_NB)
                except BlockingIOError:
                    held.append(kind)
        return adopt(file, sha256)

    monkeypatch.setattr(store._blobs, "adopt", look)
    store.get_or_run(key_of("b"), "b", {"step": "b"}, lambda output: void((output / "f").write_text("b")))
    assert held == [fcntl.LOCK_EX], "others may commit as well, and gc may not"


def void(_: object) -> ActionResult:
    return ActionResult()


def test_without_locks_gc_refuses(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store, "a", {"f": "a"}, LONG_AGO)
    before = files(store)
    monkeypatch.setattr(fcntl, "flock", Mock())
    with pytest.raises(UserError, match="locks do nothing on the store's file system"):
        gc.collect(store, max_size=0)
    assert files(store) == before


def test_where_locks_are_not_supported_gc_refuses_and_builds_build(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(38, "Function not implemented")))
    add(store, "a", {"f": "a"})
    assert steps(store) == ["a"]
    with pytest.raises(UserError, match="locks do nothing on the store's file system"):
        gc.collect(store)


def test_a_store_that_cannot_be_written_is_not_collected(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store, "a", {"f": "a"})
    monkeypatch.setattr(Store, "is_writable", False)
    with pytest.raises(UserError, match="the store cannot be written"):
        gc.collect(store, max_size=0)


# Whatever is in it

BLOBS = [str(number) * size for number, size in enumerate((1, 10, 100, 1000, 3, 30))]
ACTIONS = st.lists(st.tuples(st.sets(st.sampled_from(BLOBS), min_size=1), st.booleans()), max_size=5)


@settings(max_examples=25)
@given(ACTIONS, st.randoms(), st.integers(0, 1200))
def test_the_store_is_as_small_as_asked_for_and_the_last_used_stay(
    actions: Sequence[tuple[set[str], bool]], random: Random, max_size: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        store, building = Store(Path(name)), Store(Path(name))
        for number, (contents, pinned) in enumerate(actions):
            add(store, str(number), {f"f{i}": text for i, text in enumerate(sorted(contents))})
            if pinned:
                building.find(key_of(str(number)))
        for age, number in enumerate(random.sample(range(len(actions)), len(actions))):
            manifest = directory_of(store, str(number)) / "manifest.json"
            os.utime(manifest, (LONG_AGO - age, LONG_AGO - age))
        before = {entry.record.key: entry for entry in gc.entries(store)}
        done = gc.collect(store, max_size=max_size)

        kept = gc.entries(store)
        assert len(kept) + len(done.actions) == len(before)
        assert done.kept == gc.total_size(kept) == sum(p.stat().st_size for p in store.root.glob("blobs/*/*"))
        assert done.kept <= max_size or all(entry.pinned for entry in kept)
        assert not any(entry.pinned for entry in done.actions)
        if done.actions:
            newest_gone = max(done.actions, key=lambda entry: entry.last_used)
            assert all(entry.pinned or entry.last_used > newest_gone.last_used for entry in kept)
            assert gc.total_size([*kept, newest_gone]) > max_size, "no more went than had to"
        reader = Store(Path(name), verify=True)
        assert all(reader.find(entry.record.key) == entry.record for entry in kept), "what stays is whole"
        for each in (reader, building):
            each.close()


def test_gc_that_is_killed_is_done_by_the_next(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in "abc":
        add(store, step, {"f": step})
    removed = []
    rmtree = shutil.rmtree

    def killed_after_one(path: Path) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        rmtree(path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed_after_one)
        with pytest.raises(KeyboardInterrupt):
            gc.collect(store, max_size=0)
    assert len(gc.entries(store)) == 2
    assert list(gc.verify(store)) == []
    gc.collect(store)
    assert len(list(store.root.glob("blobs/*/*"))) == 2
