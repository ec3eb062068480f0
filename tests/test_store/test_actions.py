"""Actions: work done once, found again by its key, and nothing of it visible before all of it is there."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from furiosa_build.core import failpoints
from furiosa_build.core.canonical_json import canonical_json, digest
from furiosa_build.store import ActionResult, Store, default_store_root

from .working import FACTORS, KEY, OTHER_KEY, TWO_FILES, blob, no_work, obtain, overwrite, writing


def test_obtain_does_the_work_and_records_it(store: Store) -> None:
    record, ran = obtain(store, TWO_FILES)
    assert ran
    assert (record.key, record.step) == (KEY, "test")
    assert list(record.outputs) == ["deep/er/two", "one"]
    assert blob(store, record, "one").read_text() == "1"
    assert store.read_json(record, "deep/er/two") == {"a": 2}
    assert store.find(KEY) == record


def test_obtain_does_the_work_once(store: Store, tmp_path: Path) -> None:
    record, _ = obtain(store, TWO_FILES)
    assert obtain(store, no_work) == (record, False)
    assert obtain(Store(tmp_path / "store"), no_work) == (record, False), "another process finds it"


def test_an_unknown_key_is_not_found_and_finding_makes_nothing(store: Store, tmp_path: Path) -> None:
    assert store.find(KEY) is None
    assert not list(tmp_path.iterdir())


def test_key_factors_lie_beside_the_manifest(store: Store) -> None:
    obtain(store, TWO_FILES)
    directory = store.root / "actions" / KEY[:2] / KEY
    assert sorted(path.name for path in directory.iterdir()) == ["key_factors.json", "manifest.json"]
    assert (directory / "key_factors.json").read_bytes() == canonical_json(FACTORS)


def test_nothing_but_the_action_is_left(store: Store) -> None:
    obtain(store, TWO_FILES)
    assert not [path for path in (store.root / "sessions").glob("*/*") if path.is_dir()]


def test_outputs_are_read_only(store: Store) -> None:
    record, _ = obtain(store, TWO_FILES)
    assert [stat.S_IMODE(store.path(output).stat().st_mode) for output in record.outputs.values()] == [0o444, 0o444]


def test_what_the_work_says_of_itself_is_taken(store: Store) -> None:
    """A digest that the work computed while it wrote, and its own time: it may have waited for its turn."""
    sha256 = digest("as if computed while writing")
    record, _ = obtain(store, writing({"one": "1"}, ActionResult({"one": sha256}, seconds=12.5)))
    assert record.outputs["one"].sha256 == sha256
    assert record.seconds == 12.5


# Early cut-off


def test_equal_output_has_an_equal_digest_whatever_the_key_and_the_time(store: Store) -> None:
    one, _ = obtain(store, writing({"a": "1", "b": "2"}, ActionResult(seconds=1.0)))
    other, ran = obtain(store, writing({"b": "2", "a": "1"}, ActionResult(seconds=2.0)), OTHER_KEY)
    assert ran
    assert one.digest == other.digest
    assert blob(store, one, "a") == blob(store, other, "a"), "and is stored once"


@pytest.mark.parametrize("files", [{"a": "1"}, {"a": "1", "b": "3"}, {"a": "1", "c": "2"}, {"a": "2", "b": "1"}])
def test_other_output_has_another_digest(store: Store, files: dict[str, str]) -> None:
    one, _ = obtain(store, writing({"a": "1", "b": "2"}))
    other, _ = obtain(store, writing(files), OTHER_KEY)
    assert one.digest != other.digest


# Failures


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["failed", "interrupted"])
def test_a_failure_is_not_recorded(store: Store, error: BaseException) -> None:
    def work(output: Path) -> ActionResult:
        TWO_FILES(output)
        raise error

    with pytest.raises(type(error)):
        obtain(store, work)
    assert store.find(KEY) is None
    assert not (store.root / "actions").exists()
    assert not [path for path in (store.root / "sessions").glob("*/*") if path.is_dir()]
    assert obtain(store, TWO_FILES)[1], "the next build tries again"


def test_an_action_is_not_done_before_its_manifest_is_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, "test@before-rename=errno:ENOSPC")
        with pytest.raises(OSError, match="No space left"):
            obtain(store, TWO_FILES)
    assert not list(store.root.glob("actions/*/*/.manifest*"))
    assert store.find(KEY) is None
    assert obtain(store, TWO_FILES)[1]


# Damage


@pytest.mark.parametrize("damage", [None, b"", b"[1]", b"[1, 2] "], ids=["missing", "empty", "short", "long"])
def test_a_damaged_blob_under_a_hit_is_a_miss_and_is_healed(store: Store, damage: bytes | None) -> None:
    record, _ = obtain(store, writing({"whole": "1", "damaged": "[1, 2]"}))
    path = blob(store, record, "damaged")
    if damage is None:
        path.unlink()
    else:
        overwrite(path, damage)
    assert store.find(KEY) is None
    again, ran = obtain(store, writing({"whole": "1", "damaged": "[1, 2]"}))
    assert ran
    assert again.outputs == record.outputs
    assert path.read_text() == "[1, 2]"
    assert store.find(KEY) == again


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"key": "k"}', b"\xff\xfe"])
def test_a_damaged_manifest_is_a_miss_and_is_replaced(store: Store, damage: bytes) -> None:
    record, _ = obtain(store, TWO_FILES)
    manifest = store.root / "actions" / KEY[:2] / KEY / "manifest.json"
    overwrite(manifest, damage)
    assert store.find(KEY) is None
    assert obtain(store, TWO_FILES)[0].outputs == record.outputs
    assert json.loads(manifest.read_bytes())["key"] == KEY


# Where things are


def test_the_root_is_that_of_the_environment_or_in_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("FURIOSA_BUILD_CACHE", raising=False)
    assert default_store_root() == Path("/home/somebody/.cache/furiosa/llm")
    monkeypatch.setenv("FURIOSA_BUILD_CACHE", "")
    assert default_store_root() == Path("/home/somebody/.cache/furiosa/llm")
    monkeypatch.setenv("FURIOSA_BUILD_CACHE", "~/elsewhere")
    assert default_store_root() == Path("/home/somebody/elsewhere")


def test_logs_are_named_after_their_step(store: Store) -> None:
    path = store.log_path("compile:decode-1x64:block")
    assert path.name.startswith("compile-decode-1x64-block-")
    path.write_text("its directory is there")


def test_scratch_survives_and_is_apart_for_every_tool(store: Store) -> None:
    assert store.scratch("a") == store.scratch("a") != store.scratch("b")
    assert store.root in store.scratch("a").parents
