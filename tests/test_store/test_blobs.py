"""Blobs: content under its own sha256, whole or not at all."""

from __future__ import annotations

import hashlib
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import furiosa_build.store.blobs
from furiosa_build.core.file_digests import HashMemory
from furiosa_build.core.files import link_or_copy
from furiosa_build.store.blobs import Blobs

CONTENT = b"some content"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs", HashMemory(tmp_path / "hashes.sqlite"))


def new_file(directory: Path, content: bytes = CONTENT, name: str = "new") -> Path:
    file = directory / name
    file.write_bytes(content)
    return file


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_adopt_moves_a_file_under_its_digest(blobs: Blobs, tmp_path: Path) -> None:
    file = new_file(tmp_path)
    inode = file.stat().st_ino
    assert blobs.adopt(file) == (SHA256, len(CONTENT))
    assert not file.exists()
    assert blobs.path(SHA256) == tmp_path / "blobs" / SHA256[:2] / SHA256
    assert blobs.path(SHA256).read_bytes() == CONTENT
    assert blobs.path(SHA256).stat().st_ino == inode, "moved, not copied"


def test_a_blob_is_read_only(blobs: Blobs, tmp_path: Path) -> None:
    blobs.adopt(new_file(tmp_path))
    assert mode(blobs.path(SHA256)) == 0o444


def test_content_that_is_there_is_kept(blobs: Blobs, tmp_path: Path) -> None:
    blobs.adopt(new_file(tmp_path))
    before = blobs.path(SHA256).stat()
    again = new_file(tmp_path)
    assert blobs.adopt(again) == (SHA256, len(CONTENT))
    assert not again.exists()
    assert blobs.path(SHA256).stat().st_ino == before.st_ino, "hard links to it stay links to it"


def test_a_blob_cut_short_is_replaced(blobs: Blobs, tmp_path: Path) -> None:
    blobs.adopt(new_file(tmp_path))
    blobs.path(SHA256).chmod(0o644)
    blobs.path(SHA256).write_bytes(CONTENT[:-1])
    blobs.adopt(new_file(tmp_path))
    assert blobs.path(SHA256).read_bytes() == CONTENT


def test_a_digest_that_is_known_is_not_computed_again(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(furiosa_build.store.blobs, "hash_file")
    assert blobs.adopt(new_file(tmp_path), SHA256) == (SHA256, len(CONTENT))


@pytest.mark.parametrize(
    "damage",
    [b"", CONTENT[:-1], CONTENT + b"x", CONTENT[:-1] + b"x", None],
    ids=["empty", "short", "long", "other", "gone"],
)
def test_holds_only_what_is_there_and_whole(blobs: Blobs, tmp_path: Path, damage: bytes | None) -> None:
    assert not blobs.holds(SHA256, len(CONTENT))
    blobs.adopt(new_file(tmp_path))
    assert blobs.holds(SHA256, len(CONTENT))
    blobs.path(SHA256).unlink()
    if damage is not None:
        blobs.path(SHA256).write_bytes(damage)
    assert not blobs.holds(SHA256, len(CONTENT))


@given(st.binary(max_size=200))
def test_what_is_adopted_is_found_by_its_digest(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        blobs = Blobs(Path(name) / "blobs", HashMemory(Path(name) / "hashes.sqlite"))
        sha256, size = blobs.adopt(new_file(Path(name), content))
        assert (sha256, size) == (hashlib.sha256(content).hexdigest(), len(content))
        assert blobs.holds(sha256, size)
        assert blobs.path(sha256).read_bytes() == content


def test_place_makes_a_hard_link(tmp_path: Path) -> None:
    source, target = new_file(tmp_path), tmp_path / "a" / "b" / "placed"
    link_or_copy(source, target)
    assert target.samefile(source)


def test_place_copies_where_no_link_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_file_system(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link", str(source), None, str(target))

    monkeypatch.setattr("os.link", other_file_system)
    source, target = new_file(tmp_path), tmp_path / "a" / "placed"
    link_or_copy(source, target)
    assert not target.samefile(source)
    assert target.read_bytes() == CONTENT
    assert mode(target) == 0o444
