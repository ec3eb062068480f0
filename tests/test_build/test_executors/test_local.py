from __future__ import annotations

import os
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alone import alone

from furiosa_build.build.executors import local
from furiosa_build.build.executors.in_process import run_here
from furiosa_build.core.errors import StepError
from furiosa_build.steps.base import Inputs, Job, Request

SIZE = 64 * 2**20
NOTHING = Inputs({}, Path("scratch"))


class SizeRequest(Request):
    size: int = 1


class Write(Job[SizeRequest]):
    """Writes as many bytes as it is asked for."""

    name = "write"
    Request = SizeRequest

    def run(self, request: SizeRequest, inputs: Inputs, output: Path) -> None:
        del inputs
        (output / "made").write_bytes(bytearray(b"x") * request.size)


class Fail(Write):
    """Fails as a step that knows why."""

    name = "fail"

    def run(self, request: SizeRequest, inputs: Inputs, output: Path) -> None:
        raise StepError("fail", "the artifact does not run", "LOG")


class MeetRequest(Request):
    """`fifo` is where the two jobs of a test meet."""

    fifo: Path


class WaitForTheEnd(Job[MeetRequest]):
    """Says which process it runs in, and goes on until that is ended."""

    name = "wait"
    Request = MeetRequest

    def run(self, request: MeetRequest, inputs: Inputs, output: Path) -> None:
        del inputs, output
        request.fifo.write_text(str(os.getpid()))
        signal.sigtimedwait([signal.SIGUSR1], 60)  # which nobody sends: if nobody ends it either, the test fails


class IsKilled(WaitForTheEnd):
    """Ends as a process that the system kills, once the other job runs."""

    name = "killed"

    def run(self, request: MeetRequest, inputs: Inputs, output: Path) -> None:
        del inputs
        (output / "other").write_text(request.fifo.read_text())
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells private memory from mapped files")
@alone
def test_a_step_reports_the_memory_it_took() -> None:
    with tempfile.TemporaryDirectory() as output:
        small, large = (run_here(Write(), SizeRequest(size=size), NOTHING, Path(output)).peak for size in (1, SIZE))
    assert small is not None
    assert large is not None
    assert SIZE <= large.private - small.private < 2 * SIZE
    assert small.mapped > 0


def test_a_step_that_fails_by_a_step_error_keeps_its_cause(tmp_path: Path) -> None:
    outcome = local._work("fail", Fail(), SizeRequest(), NOTHING, tmp_path, tmp_path / "log", None)
    assert outcome == ("failed", "the artifact does not run"), "the pool names step and log once"


def test_when_a_worker_is_killed_the_others_have_ended_before_its_step_fails(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pool = local.WorkerPool(2, lambda _: NOTHING)

    def run(job: WaitForTheEnd) -> bool:
        with pytest.raises(StepError, match="its process was killed"):
            pool.run(job.name, job, MeetRequest(fifo=fifo), tmp_path, tmp_path / f"{job.name}.log")
        return Path("/proc", (tmp_path / "other").read_text()).exists()

    with ThreadPoolExecutor() as threads:
        assert not any(threads.map(run, [WaitForTheEnd(), IsKilled()]))
