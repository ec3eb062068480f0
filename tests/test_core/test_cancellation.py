"""Work that a build does in its own process ends soon after it is cancelled."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest

from furiosa_build.core import file_digests, files
from furiosa_build.core.cancellation import CancellationToken, Cancelled, cancelled_by, check_cancelled
from furiosa_build.core.file_digests import hash_file
from furiosa_build.core.files import link_or_copy

CHUNKS = 5


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is read in several pieces."""
    for module in (file_digests, files):
        monkeypatch.setattr(module, "_CHUNK", 10)
    path = tmp_path / "large"
    path.write_bytes(b"x" * 10 * CHUNKS)
    return path


class CancelsItself(CancellationToken):
    """Cancelled as soon as the work has looked at it `after` times."""

    def __init__(self, after: int) -> None:
        self.after, self.looks = after, 0

    @property
    def is_cancelled(self) -> bool:  # type: ignore[override]
        self.looks += 1
        return self.looks > self.after


def test_work_that_is_bound_to_no_token_goes_on() -> None:
    CancellationToken().cancel()
    check_cancelled()


def test_what_another_thread_does_is_bound_to_another_token() -> None:
    token = CancellationToken()
    token.cancel()
    with cancelled_by(token):
        thread = threading.Thread(target=check_cancelled)
        thread.start()
        thread.join()
        with pytest.raises(Cancelled):
            check_cancelled()
    check_cancelled()


def test_hashing_ends_at_the_next_piece(large: Path) -> None:
    token = CancelsItself(after=2)
    with cancelled_by(token), pytest.raises(Cancelled):
        hash_file(large)
    assert token.looks == 3 < CHUNKS


def test_copying_ends_at_the_next_piece(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EXDEV, "Invalid cross-device link")))
    with cancelled_by(CancelsItself(after=3)), pytest.raises(Cancelled):
        link_or_copy(large, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_size < large.stat().st_size
    link_or_copy(large, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == large.read_bytes()
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o444
