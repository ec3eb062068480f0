"""sha256 of files, remembered by path, size, times and inode."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import pytest

import furiosa_build.core.file_digests
from furiosa_build.core.file_digests import HashMemory, hash_file

CONTENT = b"some content"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SECOND = 10**9


@pytest.fixture
def memory(tmp_path: Path) -> HashMemory:
    return HashMemory(tmp_path / "memory" / "hashes.sqlite")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def set_mtime(path: Path, nanoseconds: int) -> None:
    os.utime(path, ns=(nanoseconds, nanoseconds))


def test_hash_file_reads_in_chunks_and_tells_of_each(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(furiosa_build.core.file_digests, "_CHUNK", 5)
    monkeypatch.setattr(furiosa_build.core.file_digests, "advance", told.append)
    assert hash_file(file) == SHA256
    assert told == [5, 5, 2]


def test_an_empty_file_has_a_hash(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert hash_file(tmp_path / "empty") == hashlib.sha256(b"").hexdigest()


def test_recall_knows_nothing_and_makes_nothing_at_first(memory: HashMemory, file: Path, tmp_path: Path) -> None:
    assert memory.recall(file) is None
    assert list(tmp_path.iterdir()) == [file]


def test_a_hash_is_remembered(memory: HashMemory, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.hash(file) == SHA256
    monkeypatch.delattr(furiosa_build.core.file_digests, "hash_file")
    assert memory.recall(file) == SHA256
    assert memory.hash(file) == SHA256
    assert HashMemory(tmp_path / "memory" / "hashes.sqlite").recall(file) == SHA256


def test_a_part_has_a_hash_of_its_own_that_is_remembered_beside_that_of_the_file(
    memory: HashMemory, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(furiosa_build.core.file_digests, "_CHUNK", 3)
    of_part = hashlib.sha256(CONTENT[2:9]).hexdigest()
    assert memory.hash(file, extent=(2, 9)) == of_part
    assert memory.hash(file) == SHA256
    assert memory.hash(file, extent=(0, len(CONTENT))) == SHA256
    assert memory.hash(file, extent=(5, 5)) == hashlib.sha256(b"").hexdigest()
    monkeypatch.delattr(furiosa_build.core.file_digests, "hash_file")
    again = HashMemory(memory._database)
    assert (again.hash(file, extent=(2, 9)), again.hash(file)) == (of_part, SHA256)
    assert again.recall(file, (2, 8)) is None


def test_a_link_is_the_file_that_it_leads_to(memory: HashMemory, file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file)
    memory.hash(file)
    assert memory.recall(tmp_path / "link") == SHA256


def test_another_size_is_seen(memory: HashMemory, file: Path) -> None:
    memory.hash(file)
    set_mtime(file, SECOND)
    memory.hash(file)
    file.write_bytes(CONTENT + b"!")
    set_mtime(file, SECOND)
    assert memory.recall(file) is None
    assert memory.hash(file) == hashlib.sha256(CONTENT + b"!").hexdigest()


def test_another_time_is_seen(memory: HashMemory, file: Path) -> None:
    set_mtime(file, SECOND)
    memory.hash(file)
    file.write_bytes(CONTENT.upper())
    set_mtime(file, SECOND + 1)
    assert memory.recall(file) is None
    assert memory.hash(file) == hashlib.sha256(CONTENT.upper()).hexdigest()


def test_another_inode_is_seen(memory: HashMemory, file: Path, tmp_path: Path) -> None:
    set_mtime(file, SECOND)
    memory.hash(file)
    (tmp_path / "other").write_bytes(CONTENT.upper())
    set_mtime(tmp_path / "other", SECOND)
    (tmp_path / "other").replace(file)
    assert memory.recall(file) is None
    assert memory.hash(file) == hashlib.sha256(CONTENT.upper()).hexdigest()


def test_a_touched_file_is_read_again_and_is_the_same(memory: HashMemory, file: Path) -> None:
    memory.hash(file)
    set_mtime(file, SECOND)
    assert memory.recall(file) is None
    assert memory.hash(file) == SHA256
    assert memory.recall(file) == SHA256


def rewrite_under_the_same_time(file: Path) -> None:
    """As rsync --inplace --times does, or `touch -r` after writing."""
    before = file.stat()
    file.write_bytes(CONTENT.upper())
    set_mtime(file, before.st_mtime_ns)
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # the kernel's clock ticks some hundred times a second
        set_mtime(file, before.st_mtime_ns)
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def test_other_content_under_the_same_time_is_seen(memory: HashMemory, file: Path) -> None:
    memory.hash(file)
    rewrite_under_the_same_time(file)
    assert memory.recall(file) is None
    assert HashMemory(memory._database).recall(file) is None
    assert memory.hash(file) == hashlib.sha256(CONTENT.upper()).hexdigest()


def test_links_to_a_file_of_the_store_come_and_go(memory: HashMemory, file: Path, tmp_path: Path) -> None:
    """A parameter file of 100 GB is in several artifacts. Documented: its ctime tells nothing."""
    linked = HashMemory(memory._database, linked=True)
    linked.hash(file)
    (tmp_path / "link").hardlink_to(file)
    (tmp_path / "link").unlink()
    assert HashMemory(memory._database, linked=True).recall(file) == SHA256
    rewrite_under_the_same_time(file)
    assert linked.recall(file) == SHA256


def test_what_is_known_without_ctime_is_not_known_with_it(memory: HashMemory, file: Path) -> None:
    HashMemory(memory._database, linked=True).hash(file)
    assert memory.recall(file) is None


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    memory: HashMemory, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(furiosa_build.core.file_digests, "_CHUNK", 5)

    def grow(_: int) -> None:
        if file.stat().st_size < 2 * len(CONTENT):
            with file.open("ab") as opened:
                opened.write(CONTENT)

    set_mtime(file, SECOND)
    with monkeypatch.context() as patch:
        patch.setattr(furiosa_build.core.file_digests, "advance", grow)
        assert memory.hash(file) != SHA256
    os.truncate(file, len(CONTENT))
    set_mtime(file, SECOND)
    assert memory.recall(file) is None, "although it looks as it did before"
    assert memory.hash(file) == SHA256


def test_a_missing_file_is_an_error(memory: HashMemory, file: Path) -> None:
    memory.hash(file)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        memory.recall(file)


def test_many_threads_share_a_memory(memory: HashMemory, tmp_path: Path) -> None:
    files = [tmp_path / f"file-{number}" for number in range(40)]
    for number, path in enumerate(files):
        path.write_bytes(b"%d" % number)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(memory.hash, files * 2))
    assert found == [hashlib.sha256(b"%d" % number).hexdigest() for number in range(40)] * 2
    assert [memory.recall(path) for path in files] == found[:40]


# A memory that is damaged, full or cannot be written


def test_no_flip_of_a_byte_makes_it_tell_a_wrong_hash(memory: HashMemory, file: Path, tmp_path: Path) -> None:
    """A wrong sha256 of a source would be a wrong key, and stand in the artifact."""
    memory.hash(file)
    database = tmp_path / "memory" / "hashes.sqlite"
    whole = database.read_bytes()
    known = set()
    for place in range(len(whole)):
        if whole[place] or place % 64 == 0:  # most of a database is empty
            database.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            known.add(HashMemory(database).recall(file))
    assert known == {None, SHA256}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:0],
        lambda data: b"no database" * len(data),
        lambda data: data[: len(data) // 2],
        lambda data: data[:100] + b"\xff" * (len(data) - 100),
        lambda data: data.replace(b"mtime_ns", b"mtime_xx"),
    ],
    ids=["empty", "garbage", "cut", "pages", "another table"],
)
def test_a_damaged_memory_forgets_and_heals(
    memory: HashMemory, file: Path, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    memory.hash(file)
    database = tmp_path / "memory" / "hashes.sqlite"
    database.write_bytes(spoil(database.read_bytes()))
    for _ in range(2):  # the first may only clear away
        again = HashMemory(database)
        assert again.hash(file) == SHA256
        again.remember(file, SHA256)
    assert HashMemory(database).recall(file) == SHA256


@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR_WRITE, None])
def test_a_memory_that_cannot_be_written_is_no_error(
    memory: HashMemory, file: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    memory.hash(file)
    error = sqlite3.OperationalError("no")
    if code is not None:
        error.sqlite_errorcode = code
    other = file.with_name("other")
    other.write_bytes(b"other")
    with monkeypatch.context() as patch:
        patch.setattr(HashMemory, "_write", Mock(side_effect=error))
        assert memory.hash(other) == hashlib.sha256(b"other").hexdigest()
    assert memory.recall(other) is not None, "here it is known"
    assert memory.recall(file) == SHA256, "and what was known still is"
    assert HashMemory(memory._database).recall(file) == SHA256


def test_a_directory_in_its_place_is_no_error(tmp_path: Path, file: Path) -> None:
    (tmp_path / "hashes.sqlite").mkdir()
    assert HashMemory(tmp_path / "hashes.sqlite").hash(file) == SHA256


def test_files_that_are_gone_are_forgotten(memory: HashMemory, file: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.write_bytes(b"gone")
    memory.hash(file)
    memory.hash(gone)
    gone.unlink()
    memory.forget_missing()
    with closing(sqlite3.connect(memory._database)) as connection:
        assert [path for (path,) in connection.execute("SELECT path FROM digests_of_parts")] == [
            os.fsencode(file.resolve())
        ]


def test_a_name_that_is_not_utf8_is_remembered(memory: HashMemory, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.write_bytes(CONTENT)
    memory.hash(odd)
    assert HashMemory(memory._database).recall(odd) == SHA256


def test_a_memory_in_a_directory_whose_name_is_not_utf8(file: Path, tmp_path: Path) -> None:
    database = tmp_path / os.fsdecode(b"caf\xe9") / "hashes.sqlite"
    HashMemory(database).hash(file)
    assert HashMemory(database).recall(file) == SHA256


def test_a_memory_that_does_not_trust_reads_again(memory: HashMemory, file: Path) -> None:
    set_mtime(file, SECOND)
    memory.hash(file)
    file.write_bytes(CONTENT.upper())
    set_mtime(file, SECOND)
    distrustful = HashMemory(memory._database, trust=False)
    assert distrustful.recall(file) is None
    assert distrustful.hash(file) == hashlib.sha256(CONTENT.upper()).hexdigest()
    assert distrustful.recall(file) is not None, "once is enough"
