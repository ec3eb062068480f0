"""`furiosa-build build` itself, with its workers: killed, waiting, interrupted, failing."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from grid import grid
from user_directory import UserDirectory, furiosa_build, steps_in_this_process

from furiosa_build.core import failpoints
from furiosa_build.store import Store

from .conftest import assert_sound, build

COMMAND = [sys.executable, "-c", "from furiosa_build.cli.main import main; main()", "build", "tiny"]
STEP = "compile:decode-2x64:block"


@pytest.fixture(autouse=True, scope="module")
def _programs_unlike_graphs() -> Iterator[None]:
    """Here they are as in the other processes."""
    with steps_in_this_process():
        yield


@contextmanager
def building(user: UserDirectory, *overrides: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command, running; killed if it still runs at the end."""
    process = subprocess.Popen(
        [*COMMAND, *overrides],
        cwd=user.root,
        env={**os.environ, "FURIOSA_BUILD_CACHE": str(user.store), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def descendants(pid: int) -> list[int]:
    children = [
        int(child)
        for thread in Path(f"/proc/{pid}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


def wait_for_the_end(pid: int) -> None:
    """Of a process that is not a child of this one."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], 30)[0], f"process {pid} goes on"
    finally:
        os.close(descriptor)


@pytest.mark.grid
def test_a_build_that_waits_says_so_and_can_be_interrupted_and_one_that_is_killed_takes_its_workers_along(
    fresh: UserDirectory, artifact_id: str, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with building(fresh, **{failpoints.VARIABLE: f"{STEP}@before-rename={pipe}"}) as first:
        assert pipe.read_text() == f"{first.pid}\n"

        with building(fresh) as second:
            assert second.stdout is not None
            message = f"{STEP}: waiting for process {first.pid} on {os.uname().nodename}, which is doing it\n"
            assert message in iter(second.stdout.readline, "")
            second.send_signal(signal.SIGINT)
            out, err = second.communicate(timeout=60)
            assert (second.returncode, err) == (130, "interrupted by SIGINT\n")
            assert "the next build goes on from there" in out

        processes = descendants(first.pid)
        assert processes, "there are workers"
        first.kill()
        first.wait()
    for pid in processes:
        wait_for_the_end(pid)

    kept = {record.step for record, _, _ in Store(fresh.store).records()}
    assert STEP not in kept
    ran = build(fresh)
    assert STEP in ran
    assert not kept & set(ran)
    assert_sound(fresh, artifact_id)


def test_the_log_of_a_step_that_fails_is_kept_and_named_and_the_next_build_tries_again(user: UserDirectory) -> None:
    fault = {failpoints.VARIABLE: "quantize@mid-write=errno:ENOSPC"}
    with building(user, "quantization=int8", **fault) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "Traceback" not in out + err
    message = re.fullmatch(
        r"error: step quantize failed: OSError: \[Errno 28\] No space left on device: .*\n  log: (.*)\n", err
    )
    assert message is not None
    log = Path(message[1])
    assert (log.parent, log.name) == (user.store / "logs", f"quantize-{process.pid}.log")
    assert "OSError: [Errno 28] No space left on device" in log.read_text()
    assert furiosa_build(user, "cache", "verify").status == 0
    assert build(user, "quantization=int8")[0] == "quantize"
    assert log.exists()


def make_waiting_compiler(directory: Path) -> tuple[Path, Path]:
    """A compiler that never ends, after two paths: a named pipe that it writes its process id to, and itself."""
    reached, compiler = directory / "reached", directory / "compiler"
    os.mkfifo(reached)
    compiler.write_text(
        "#!/bin/sh\n"
        'case " $* " in *" --version "* | *" -E "*) exec g++ "$@" ;; esac\n'  # what it is asked before it compiles
        f'echo $$ > "{reached}"\nexec sleep 600\n'
    )
    compiler.chmod(0o755)
    return reached, compiler


@pytest.mark.grid
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_compilation_ends_its_processes_and_the_next_build_goes_on(
    fresh: UserDirectory, artifact_id: str, tmp_path: Path, number: signal.Signals
) -> None:
    reached, compiler = make_waiting_compiler(tmp_path)
    with building(fresh, "backend=inductor", CXX=str(compiler)) as process:
        compiling = int(reached.read_text())
        processes = [*descendants(process.pid), compiling]
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == f"interrupted by {number.name}\n"
    assert out.splitlines()[-1].endswith("kept in the store; the next build goes on from there")
    for pid in processes:
        wait_for_the_end(pid)
    assert list((fresh.store / "sessions").iterdir()) == []
    kept = {record.step for record, _, _ in Store(fresh.store).records()}
    assert {"survey", "fetch"} <= kept
    assert not kept & set(build(fresh))
    assert_sound(fresh, artifact_id)


JUDGING = "scheduler.max_processing_samples=1"
"""Makes another artifact, which is to be judged, without compiling anything."""


def test_a_judge_that_is_killed_is_said_to_have_been(user: UserDirectory, tmp_path: Path) -> None:
    """By the system, say, when memory runs out. transformers runs in a process of its own, and so it alone ends."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with building(user, JUDGING, **{failpoints.VARIABLE: f"qualify@mid-judge={pipe}"}) as process:
        judge = int(pipe.read_text())
        below = descendants(judge)
        assert below, "the artifact's process is there"
        os.kill(judge, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    why = "the reference does not run: its process was ended by SIGKILL (out of memory?)"
    assert err.startswith(f"error: step qualify failed: {why}\n  log: ")
    assert process.returncode == 3
    for pid in below:
        wait_for_the_end(pid)
    assert build(user, JUDGING) == ["qualify"]


@pytest.mark.parametrize("number", grid([signal.SIGINT, signal.SIGKILL], []))
def test_a_build_that_ends_while_an_artifact_is_judged_leaves_no_process(
    user: UserDirectory, tmp_path: Path, number: signal.Signals
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with building(user, JUDGING, **{failpoints.VARIABLE: f"qualify@mid-judge={pipe}"}) as process:
        processes = [int(pipe.read_text()), *descendants(process.pid)]
        process.send_signal(number)
        process.communicate(timeout=60)
    for pid in processes:
        wait_for_the_end(pid)
    assert build(user, JUDGING) == ["qualify"]


SCRIPT = """
import multiprocessing
from furiosa_build.artifact.builder import ArtifactBuilder
buckets = {"prefill_buckets": [(1, 32)], "decode_buckets": [(2, 64)], "max_seq_len_to_capture": 64}
builder = ArtifactBuilder("tiny", "cpu", tensor_parallel_size=1, **buckets)
try:
    builder.build("out")
except KeyboardInterrupt as interrupt:
    print(interrupt, multiprocessing.active_children())
"""


@pytest.mark.grid
def test_ctrl_c_in_a_script_is_keyboard_interrupt_after_the_workers_have_ended(
    fresh: UserDirectory, tmp_path: Path
) -> None:
    """A build from Python prints nothing, and leaves the script to go on."""
    reached, compiler = make_waiting_compiler(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=fresh.root,
        env={**os.environ, "FURIOSA_BUILD_CACHE": str(fresh.store), "CXX": str(compiler)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            processes = [int(reached.read_text()), *descendants(process.pid)]
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "interrupted by SIGINT []\n", "")
    for pid in processes:
        wait_for_the_end(pid)
    assert {"survey", "fetch"} <= {record.step for record, _, _ in Store(fresh.store).records()}
