"""A sweep builds what its points would be alone, and does once what they share."""

from __future__ import annotations

import csv
import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from user_directory import Ran, UserDirectory, furiosa_build, make_new_directory, steps_in_this_process

from furiosa_build.build.reporter import EventReporter
from furiosa_build.build.sweep import Sweep, _Alone
from furiosa_build.core.errors import StepError
from furiosa_build.core.events import ErrorOccurred, Event
from furiosa_build.recipe.sweep import sweep_points

SWEEP = ("quantization=none,int8", "buckets.decode_buckets=[[2,64]],[[1,64]],[[1,64],[2,64]]")


@pytest.fixture(scope="module", autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    return make_new_directory(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def swept(user: UserDirectory) -> Ran:
    ran = furiosa_build(user, "build", "tiny", "--multirun", "--json", *SWEEP)
    assert ran.status == 0, ran.err
    return ran


def results(user: UserDirectory) -> Path:
    [directory] = (user.root / "sweeps" / "tiny").iterdir()
    return directory


def test_every_step_runs_once(user: UserDirectory, swept: Ran) -> None:
    events = [json.loads(line) for line in swept.out.splitlines()]
    finished = [event for event in events if event["event"] == "step-ended"]
    assert {event["state"] for event in finished} == {"ran"}, "none was found, none was waited for"
    assert max(Counter(event["key"] for event in finished).values()) == 1
    kinds = Counter(event["step"].partition(":")[0].partition("@")[0] for event in finished)
    assert (kinds["fetch"], kinds["package"], kinds["qualify"]) == (1, 6, 6)
    planned = furiosa_build(user, "plan", "tiny", "-m", *SWEEP)
    assert planned.out.splitlines()[-1].endswith(f" steps, {len(finished)} distinct, 0 to do")


@pytest.mark.usefixtures("swept")
def test_each_point_is_what_it_is_alone(user: UserDirectory) -> None:
    points = json.loads((results(user) / "results.json").read_text())["points"]
    assert not (user.artifacts / "latest").exists(), "a sweep does not choose among its points"
    [point] = [one for one in points if one["overrides"] == ["quantization=int8", "buckets.decode_buckets=[[1,64]]"]]
    alone = user.open("quantization=int8", "buckets.decode_buckets=[[1,64]]")
    undone = [name for name in alone.steps if not alone.is_done(name)]
    assert undone == ["qualify"], "latest does not point to it"
    assert alone.version_directory == Path(point["artifact"])
    alone.close()


@pytest.mark.usefixtures("swept")
def test_what_has_become_of_the_points_is_written_down(user: UserDirectory) -> None:
    with (results(user) / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["quantization"] for row in rows] == ["none"] * 3 + ["int8"] * 3
    sizes = [int(row["size"]) for row in rows]
    assert max(sizes[3:]) < min(sizes[:3])
    assert all(float(row["shared_seconds"]) > 0 for row in rows)
    assert all(float(row["top1_agreement"]) > 0.5 for row in rows)


@pytest.mark.usefixtures("swept")
def test_points_that_fail_do_not_stop_the_others(user: UserDirectory) -> None:
    limits = "qualify.max_kl_divergence=1e-12,2e-12,3e-12,4e-12,10"
    build = ("build", "tiny", "-m", "quantization=int8", "model.num_hidden_layers=1", limits)
    ran = furiosa_build(user, *build)
    assert ran.status == 3
    assert "error: point 0, qualify.max_kl_divergence=1e-12: step qualify failed: quantization costs more" in ran.err
    assert ran.err.count("quantization costs more") == 4
    again = furiosa_build(user, *build)
    assert again.status == 3, "they fail again"
    table = again.out.splitlines()
    assert sum(line.endswith("not built") for line in table) == 4
    assert any("max_kl_divergence=10 " in line and " kB " in line for line in table)


def test_what_fails_is_told_when_it_fails(user: UserDirectory) -> None:
    told: list[Event] = []
    sweep = Sweep(
        sweep_points("tiny", [f"cache_dir='{user.store}'", SWEEP[0]], cwd=user.root), user.root, [told.append]
    )
    EventReporter(sweep).fail("quantize@1", StepError("quantize", "no reason"))
    sweep.close()
    assert [event.message for event in told if isinstance(event, ErrorOccurred)] == [
        "point 1, quantization=int8: step quantize failed: no reason"
    ]


@pytest.mark.usefixtures("swept")
def test_fail_fast_begins_no_other_step(user: UserDirectory) -> None:
    limits = "qualify.max_kl_divergence=2e-12,3e-12"
    build = ("build", "tiny", "-m", "--fail-fast", "quantization=int8", "model.num_hidden_layers=1", limits)
    ran = furiosa_build(user, *build)
    assert ran.status == 3
    assert ran.err.count("quantization costs more") == 1


@pytest.mark.usefixtures("swept")
def test_points_that_turn_out_to_be_the_same_artifact_all_have_it(user: UserDirectory) -> None:
    ran = furiosa_build(user, "build", "tiny", "-m", "model.num_hidden_layers=1", "model.model_id_or_path=tiny,./tiny")
    assert ran.status == 0, ran.err
    found = [line.split() for line in ran.out.splitlines() if "model_id_or_path=" in line]
    assert len(found) == 2
    assert found[0][2] == found[1][2]


def test_a_step_that_is_to_run_alone_waits_for_the_others_and_they_for_it() -> None:
    gate, begun = _Alone(), list[str]()
    inside = {name: threading.Event() for name in ("first", "alone")}
    leave = {name: threading.Event() for name in ("first", "alone")}

    def run(name: str, alone: bool = False) -> None:
        with gate.running(alone):
            begun.append(name)
            if name in inside:
                inside[name].set()
                leave[name].wait()

    def waits(future: Future[None]) -> bool:
        return not wait([future], timeout=0.1).done

    with ThreadPoolExecutor() as threads:
        try:
            threads.submit(run, "first")
            inside["first"].wait()
            threads.submit(run, "beside").result(timeout=10)
            alone = threads.submit(run, "alone", True)
            assert waits(alone)
            assert begun == ["first", "beside"]
            leave["first"].set()
            inside["alone"].wait()
            after = threads.submit(run, "after")
            assert waits(after)
            assert begun == ["first", "beside", "alone"]
        finally:
            leave["first"].set()
            leave["alone"].set()
    assert begun == ["first", "beside", "alone", "after"]


def test_a_mistake_in_one_point_is_told_before_any_is_built(user: UserDirectory) -> None:
    ran = furiosa_build(
        user, "build", "tiny", "-m", "quantization=none,int8", "buckets.decode_buckets=[[1,64]],[[0,64]]"
    )
    assert ran.status == 2
    assert "error: in quantization=none buckets.decode_buckets=[[0,64]], quantization=int8" in ran.err
    assert ran.out == ""


def test_what_the_model_does_not_allow_is_told_with_its_points(user: UserDirectory) -> None:
    ran = furiosa_build(user, "plan", "tiny", "-m", "parallel.tensor_parallel_size=1,3,5")
    assert ran.status == 2
    assert "in parallel.tensor_parallel_size=3: tensor_parallel_size=3 does not divide" in ran.err
    assert "\nin parallel.tensor_parallel_size=5: tensor_parallel_size=5 does not divide" in ran.err


def test_options_that_are_for_one_artifact_are_refused(user: UserDirectory) -> None:
    assert "--check builds one artifact again" in furiosa_build(user, "build", "tiny", "-m", "--check").err
    assert "a sweep's plan is text" in furiosa_build(user, "plan", "tiny", "-m", "--json").err
