"""A sweep builds what its points would be alone, and does once what they share."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from user_directory import Ran, UserDirectory, furiosa_build, make_new_directory, steps_in_this_process

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
def test_a_point_that_fails_does_not_stop_the_others(user: UserDirectory) -> None:
    limits = "qualify.max_kl_divergence=1e-12,10"
    ran = furiosa_build(user, "build", "tiny", "-m", "quantization=int8", "model.num_hidden_layers=1", limits)
    assert ran.status == 3
    assert "error: point 0, qualify.max_kl_divergence=1e-12: step qualify failed: quantization costs more" in ran.err
    table = ran.out.splitlines()
    assert any(line.endswith("not built") and "1e-12" in line for line in table)
    assert any("max_kl_divergence=10 " in line and " kB " in line for line in table)
    assert (
        furiosa_build(user, "build", "tiny", "-m", "quantization=int8", "model.num_hidden_layers=1", limits).status == 3
    )


@pytest.mark.usefixtures("swept")
def test_fail_fast_begins_no_other_step(user: UserDirectory) -> None:
    limits = "qualify.max_kl_divergence=2e-12,3e-12"
    build = ("build", "tiny", "-m", "--fail-fast", "quantization=int8", "model.num_hidden_layers=1", limits)
    ran = furiosa_build(user, *build)
    assert ran.status == 3
    assert ran.err.count("quantization costs more") == 1


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
