"""What is written down of an action is read back whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_build.core.canonical_json import canonical_json, digest
from furiosa_build.store import ActionRecord, Output
from furiosa_build.store.records import FACTORS, MANIFEST, read_action, write_action

KEY_FACTORS = {"step": "test", "reads": {"name": "ä", "size": 1.5}}
KEY = digest(KEY_FACTORS)
RECORD = ActionRecord(
    key=KEY, step="test", seconds=0.125, peak_memory=1, outputs={"program.so": Output(size=3, sha256="ab" * 32)}
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_action(tmp_path / KEY, RECORD, KEY_FACTORS)
    return tmp_path / KEY


def test_what_is_written_is_read(directory: Path) -> None:
    assert read_action(directory) == (RECORD, KEY_FACTORS)
    assert sorted(path.name for path in directory.iterdir()) == [FACTORS, MANIFEST]


@pytest.mark.parametrize("name", [MANIFEST, FACTORS])
def test_a_flip_of_any_byte_is_seen(directory: Path, name: str) -> None:
    whole = (directory / name).read_bytes()
    for place in range(len(whole)):
        flipped = whole[place] ^ 1 << place % 8
        (directory / name).write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            read_action(directory)


@pytest.mark.parametrize("name", [MANIFEST, FACTORS])
def test_a_file_cut_short_anywhere_is_seen(directory: Path, name: str) -> None:
    whole = (directory / name).read_bytes()
    for length in range(len(whole)):
        (directory / name).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            read_action(directory)


@pytest.mark.parametrize("content", [b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b'{"a":NaN}'])
@pytest.mark.parametrize("name", [MANIFEST, FACTORS])
def test_garbage_is_seen(directory: Path, name: str, content: bytes) -> None:
    (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        read_action(directory)


def test_the_manifest_of_another_action_is_seen(directory: Path, tmp_path: Path) -> None:
    factors = {"step": "other"}
    write_action(tmp_path / "other", RECORD.model_copy(update={"key": digest(factors)}), factors)
    (tmp_path / "other" / MANIFEST).replace(directory / MANIFEST)
    with pytest.raises(ValueError, match=f"{MANIFEST} is damaged"):
        read_action(directory)


@pytest.mark.parametrize("name", [MANIFEST, FACTORS])
def test_half_an_action_is_none(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError):
        read_action(directory)


def test_fields_that_came_later_may_be_missing(directory: Path) -> None:
    """A store that an earlier version has written stays of use."""
    manifest = RECORD.model_dump(mode="json", exclude={"peak_memory", "peak_mapped"})
    (directory / MANIFEST).write_bytes(canonical_json({**manifest, "sha256": digest(manifest)}))
    assert read_action(directory)[0] == RECORD.model_copy(update={"peak_memory": None})
