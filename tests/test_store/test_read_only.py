"""A store that cannot be written is used as it is; what it lacks is made beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from furiosa_build.store import Store

from .working import OTHER_KEY, TWO_FILES, blob, no_work, obtain, overwrite, writing


def written(root: Path) -> dict[Path, tuple[int, int, int]]:
    """Mode, size and time of writing of every path; the time of reading may change."""
    stats = {path: path.stat() for path in root.rglob("*")}
    return {path: (stat.st_mode, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.fixture
def sealed(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store with the action of KEY, as someone sees it who may not write there."""
    obtain(store, TWO_FILES)
    store.close()
    monkeypatch.setattr(Store, "is_writable", property(lambda self: self.root != tmp_path / "store"))
    before = written(store.root)
    yield Store(store.root, fallback=tmp_path / "fallback" / "deep")
    assert written(store.root) == before


def test_what_it_has_is_used(sealed: Store, tmp_path: Path) -> None:
    record, ran = obtain(sealed, no_work)
    assert not ran
    assert blob(sealed, record, "one").read_text() == "1"
    sealed.close()
    assert not (tmp_path / "fallback").exists()


def test_what_it_lacks_is_made_beside_it_and_said_once(sealed: Store, tmp_path: Path) -> None:
    told: list[str] = []
    sealed.notify = told.append
    sealed.log_path("test")
    record, ran = obtain(sealed, writing({"new": "[2]"}), OTHER_KEY)
    assert ran
    another = "cache_dir or FURIOSA_BUILD_CACHE names another"
    assert told == [f"the store {sealed.root} cannot be written: what is built is not kept there; {another}"]
    assert obtain(sealed, no_work, OTHER_KEY) == (record, False)
    assert sealed.find(OTHER_KEY) == record
    assert sealed.read_json(record, "new") == [2]
    assert tmp_path / "fallback" / "deep" in blob(sealed, record, "new").parents
    sealed.close()
    assert list((tmp_path / "fallback" / "deep").iterdir()) == []


def test_the_log_of_a_step_that_fails_stays(sealed: Store, tmp_path: Path) -> None:
    """The rest of the substitute goes."""
    with pytest.raises(ZeroDivisionError):
        obtain(sealed, Mock(side_effect=ZeroDivisionError), OTHER_KEY)
    obtain(sealed, TWO_FILES, OTHER_KEY)
    log = sealed.log_path("test")
    log.write_text("why")
    sealed.close()
    assert log.read_text() == "why"
    assert [path for path in (tmp_path / "fallback").rglob("*") if not path.is_dir()] == [log]


def test_what_is_damaged_there_is_made_beside_it(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And taken from there, although a blob of its name is in the store."""
    record, _ = obtain(store, TWO_FILES)
    overwrite(blob(store, record, "one"), b"?")
    store.close()
    monkeypatch.setattr(Store, "is_writable", property(lambda self: self.root != tmp_path / "store"))
    sealed = Store(store.root, fallback=tmp_path / "fallback")
    again, ran = obtain(sealed, TWO_FILES)
    assert ran
    assert blob(sealed, again, "one").read_text() == "1"
    sealed.close()


def test_whether_it_can_be_written_is_that_of_the_nearest_directory(tmp_path: Path) -> None:
    assert Store(tmp_path / "not" / "yet").is_writable
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert not Store(tmp_path / "gone").is_writable, "a link that leads nowhere can be neither made nor written"
