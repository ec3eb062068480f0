"""The events of a build: whole sequences, two builds at once in one process, and Ctrl-C in a library build."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from user_directory import UserDirectory, make_built_directory, make_user_directory, steps_in_this_process

from furiosa_build.build import graph
from furiosa_build.build.artifact_builder import ArtifactBuilder
from furiosa_build.build.build import Build
from furiosa_build.core.errors import PreflightError, StepError
from furiosa_build.core.events import (
    ArtifactReady,
    BuildFinished,
    BuildStarted,
    ErrorOccurred,
    Event,
    Interrupted,
    Note,
    StepFinished,
    StepStarted,
)


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """A directory in which the recipe has been built. Not to be changed but in ways that tests name apart."""
    return make_built_directory(tmp_path_factory.mktemp("events"))


@pytest.fixture
def fresh(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """A directory in which nothing has been built."""
    return make_user_directory(tmp_path / "user", tmp_path / "store", built.root / "tiny")


def listened(build: Build) -> list[Event]:
    """The events of a build, as they come."""
    events: list[Event] = []
    build.events.listeners.append(events.append)
    return events


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events]


def test_a_build_with_something_to_do(built: UserDirectory) -> None:
    build = built.open("name=other")
    events = listened(build)
    assert graph.run(build) == 0
    done = [event for event in events if isinstance(event, StepFinished)]
    assert [(event.step, event.state) for event in done if event.state != "up to date"] == [
        ("package", "ran"),
        ("qualify", "ran"),
    ]
    assert sorted(event.step for event in done) == sorted(build.plan.steps)
    record = build.outcomes["package"].record
    [package] = [event for event in done if event.step == "package"]
    assert (package.seconds, package.key, package.peak_memory) == (record.seconds, record.key, record.peak_memory)
    assert package.size == sum(output.size for output in record.outputs.values())
    assert [kind for kind, event in zip(kinds(events), events, strict=True) if event not in done] == [
        "BuildStarted",
        "Note",  # that the model has no tokenizer
        "StepStarted",
        "StepStarted",
        "ArtifactReady",
        "BuildFinished",
    ]
    started, ended = events[0], events[-1]
    assert isinstance(started, BuildStarted)
    assert (started.recipe, started.steps) == ("other", tuple(build.plan.steps))
    assert set(started.expected) == {"package", "qualify"}
    assert isinstance(ended, BuildFinished)
    assert (ended.status, ended.ran, ended.up_to_date) == (0, 2, len(build.plan.steps) - 2)
    assert ended.artifact == build.version_directory
    assert [event.time for event in events] == sorted(event.time for event in events)


def test_a_build_that_is_refused(built: UserDirectory) -> None:
    build = built.open("target.memory_gb=0.00001", "quantization=int8")
    events = listened(build)
    with pytest.raises(PreflightError) as refused:
        graph.execute(build)
    assert kinds(events) == ["ErrorOccurred", "BuildFinished"]
    [error, ended] = events
    assert isinstance(error, ErrorOccurred)
    assert (error.message, error.status, error.traceback) == (str(refused.value), 4, "")
    assert isinstance(ended, BuildFinished)
    assert (ended.status, ended.ran, ended.artifact) == (4, 0, None)


def test_a_step_that_fails(fresh: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FURIOSA_BUILD_FAULT", "package@before-staging=errno:ENOSPC")
    build = fresh.open()
    events = listened(build)
    with pytest.raises(StepError, match="step package failed: OSError"):
        graph.execute(build)
    note, error, ended = events[-3:]
    assert isinstance(note, Note)
    assert note.text == "15 steps ran, kept in the store; the next build goes on from there"
    assert isinstance(error, ErrorOccurred)
    assert (error.status, error.traceback) == (3, "")
    assert isinstance(ended, BuildFinished)
    assert (ended.status, ended.ran) == (3, 15)
    started = {event.step for event in events if isinstance(event, StepStarted)}
    finished = {event.step for event in events if isinstance(event, StepFinished)}
    assert started - finished == {"package"}
    assert not any(isinstance(event, ArtifactReady) for event in events)


@pytest.mark.grid
def test_two_builds_at_once(fresh: UserDirectory) -> None:
    """Of different recipes and with one store: each has its own events and its own artifact."""
    builds = [fresh.open("name=one"), fresh.open("name=two", "buckets.decode_buckets=[[1,64]]")]
    heard = [listened(build) for build in builds]
    statuses: dict[str, int] = {}

    def build_one(build: Build) -> None:
        statuses[build.spec.name] = graph.run(build)

    threads = [threading.Thread(target=build_one, args=(build,)) for build in builds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == {"one": 0, "two": 0}
    for build, events in zip(builds, heard, strict=True):
        started, ended = events[0], events[-1]
        assert isinstance(started, BuildStarted)
        assert (started.recipe, started.steps) == (build.spec.name, tuple(build.plan.steps))
        assert isinstance(ended, BuildFinished)
        assert ended.artifact is not None
        assert ended.artifact.parent.name == build.spec.name
        steps = [event.step for event in events if isinstance(event, StepFinished)]
        assert sorted(steps) == sorted(build.plan.steps)
        assert ended.ran + ended.up_to_date == len(steps)
        assert kinds(events).count("BuildFinished") == 1
    ran = [
        event.step for events in heard for event in events if isinstance(event, StepFinished) if event.state == "ran"
    ]
    of_both = {"fetch", "quantize", "partition:weights", "compile:prefill-1x32:last"}
    assert all(ran.count(step) == 1 for step in of_both), "what both need is done once"


def test_ctrl_c_in_a_library_build(fresh: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is KeyboardInterrupt, when the workers have ended; what was done is kept, and the handler is as before."""
    builder = ArtifactBuilder(
        str(fresh.root / "tiny"),
        "cpu",
        tensor_parallel_size=1,
        prefill_buckets=[(1, 32)],
        decode_buckets=[(1, 64)],
        max_seq_len_to_capture=64,
        backend="eager",
    )
    events: list[Event] = []

    def interrupt_quantize(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepStarted) and event.step == "quantize":
            signal.raise_signal(signal.SIGINT)

    builder.listeners.append(interrupt_quantize)
    closed = []
    monkeypatch.setattr(Build, "close", lambda self: closed.append(self.spec.name))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="interrupted by SIGINT"):
        builder.build(fresh.root / "out", cache_dir=fresh.store)
    assert signal.getsignal(signal.SIGINT) is handler
    assert closed
    interrupted, ended = events[-2:]
    assert isinstance(interrupted, Interrupted)
    assert interrupted.signal == "SIGINT"
    assert isinstance(ended, BuildFinished)
    assert (ended.status, ended.artifact) == (130, None)
    kept = {event.step for event in events if isinstance(event, StepFinished)}
    assert "fetch" in kept


def test_builds_leave_no_temporary_files(built: UserDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for _ in range(3):
        assert graph.run(built.open()) == 0
    assert [path.name for path in tmp_path.iterdir() if "doit" in path.name] == []


def test_events_are_plain_data() -> None:
    types = {annotation for event in Event.__subclasses__() for annotation in (each.type for each in fields(event))}
    assert not [annotation for annotation in types if "Build" in str(annotation)]
