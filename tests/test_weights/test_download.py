"""Downloads run in a process of their own, which ends with the build or before."""

from __future__ import annotations

import contextvars
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from furiosa_build.core.cancellation import CancellationToken, Cancelled, cancelled_by
from furiosa_build.core.errors import UserError
from furiosa_build.weights import hub

STALLED = """\
import os, sys, threading
from furiosa_build.weights import download

def fetch(**request):
    with open(os.environ["PIPE"], "w") as pipe:
        pipe.write(str(os.getpid()))
    threading.Event().wait()

download.fetch = fetch
download.main({"meter": None, "patterns": ["*"]})
"""


@pytest.fixture
def pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A download that stalls for ever writes its process's id there."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setenv("PIPE", str(pipe))
    (tmp_path / "stalled.py").write_text(STALLED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setattr(hub, "_MODULE", "stalled")
    return pipe


def wait_for_the_end(pid: int) -> None:
    """Of a process that may be nobody's child any more."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], 30)[0], f"process {pid} goes on"
    finally:
        os.close(descriptor)


def test_a_download_that_stalls_is_cancelled(pipe: Path) -> None:
    token, ended = CancellationToken(), []

    def download() -> None:
        with pytest.raises(Cancelled) as caught:
            hub.download("org/model", "main", ["*"])
        ended.append(caught.value)

    with cancelled_by(token):
        thread = threading.Thread(target=contextvars.copy_context().run, args=(download,))
        thread.start()
    pid = int(pipe.read_text())
    token.cancel()
    thread.join(30)
    assert ended
    wait_for_the_end(pid)


def test_it_ends_with_the_build_however_that_ends(pipe: Path) -> None:
    code = "from furiosa_build.weights import hub\nhub._MODULE = 'stalled'; hub.download('org/model', 'main', ['*'])"
    with subprocess.Popen([sys.executable, "-c", code]) as build:
        pid = int(pipe.read_text())
        build.send_signal(signal.SIGKILL)
    wait_for_the_end(pid)


def test_what_the_hub_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        hub.download("org/model", "main", ["config.json"])
    assert error.value.what == (
        "model 'org/model' (revision main) could not be fetched: its files are not all in the hub's cache, and "
        "HF_HUB_OFFLINE is set"
    )


def test_a_download_that_breaks_is_an_error_of_this_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_MODULE", "there.is.none")
    with pytest.raises(RuntimeError, match=r"the download ended with status 1: .*there"):
        hub.download("org/model", "main", ["config.json"])
