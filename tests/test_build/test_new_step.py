"""A kind of step that is added in one file is planned, keyed, explained, costed, run and reported like the others.

It comes between `quantize` and `partition:weights`, and hands the checkpoint on.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from user_directory import UserDirectory, furiosa_build, make_new_directory, run, steps_in_this_process

from furiosa_build.core.safetensors_header import read_header
from furiosa_build.plan import keys
from furiosa_build.plan.explain import Explanation
from furiosa_build.steps.base import BuildState, Entry, Inputs, Likeness, Request, Step, Work
from furiosa_build.steps.registry import registered
from furiosa_build.ui.explain_text import explain_text
from furiosa_build.ui.plan_text import plan_data, plan_text

if TYPE_CHECKING:
    from furiosa_build.plan.budget.costs import Costs
    from furiosa_build.plan.budget.durations import KnownStep
    from furiosa_build.plan.planner import PlannedStep, Site


class CountRequest(Request):
    """`weight`: what a tensor counts."""

    weight: int


class Count(Step[CountRequest]):
    """Copies the checkpoint and counts its tensors."""

    name = label = "count"
    Request = CountRequest
    makes = "checkpoint"
    packages = ("safetensors",)
    weight: ClassVar[int] = 1

    def plan(self, site: Site) -> Entry:
        needs = {site.maker("checkpoint"): "*.safetensors"}
        return Entry(self.name, "copy the checkpoint and count its tensors", needs, {"weight": self.weight})

    def request(self, step: PlannedStep, state: BuildState) -> CountRequest:
        [checkpoint] = step.needs
        files = {name: file.sha256 for name, file in state.files(checkpoint).items() if name.endswith(".safetensors")}
        return CountRequest(inputs=files, weight=self.weight)

    def run(self, request: CountRequest, inputs: Inputs, output: Path) -> dict[str, str]:
        count = 0
        for name, path in inputs.files.items():
            count += request.weight * len(read_header(path))
            shutil.copyfile(path, output / name)
        (output / "count.json").write_text(json.dumps(count))
        return request.inputs

    def work(self, step: PlannedStep, costs: Costs) -> Work:
        return Work(costs.of(step).files, costs.of(step).files)

    def likeness(self, step: KnownStep) -> Likeness:
        return Likeness(size=10 * step.reads["weight"])


INT8 = "quantization=int8"
WEIGHTS = ["count", "partition:weights"]


@pytest.fixture
def user(tmp_path: Path) -> UserDirectory:
    return make_new_directory(tmp_path)


@pytest.fixture
def _registered() -> Iterator[None]:
    with registered(Count(), after="quantize"), steps_in_this_process():
        yield


def stored(user: UserDirectory, step: str, file: str) -> Any:
    """The content of what a step has made."""
    with closing(user.open(INT8)) as build:
        return build.store.read_json(build.run(step).record, file)


@pytest.mark.usefixtures("_registered")
def test_it_is_planned(user: UserDirectory) -> None:
    with closing(user.open(INT8)) as build:
        steps, text = build.plan.steps, plan_text(build)
    assert list(steps)[:4] == ["fetch", "quantize", "count", "partition:weights"]
    assert steps["count"].needs == {"quantize": "*.safetensors"}
    assert steps["partition:weights"].needs == {"count": "*.safetensors"}
    assert steps["qualify"].needs == {"package": "artifact.json", "fetch": "*", "count": "*.safetensors"}
    lines = [line.split(maxsplit=3) for line in text.splitlines() if line.startswith("  to do")]
    assert ["to", "do", "count", "copy the checkpoint and count its tensors"] in lines
    assert f"{len(steps)} to do" in text


def test_without_it_nothing_is_planned_of_it(user: UserDirectory) -> None:
    with steps_in_this_process(), closing(user.open(INT8)) as build:
        assert "count" not in build.plan.steps
        assert build.plan.steps["partition:weights"].needs == {"quantize": "*.safetensors"}


@pytest.mark.usefixtures("_registered")
def test_it_is_costed(user: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(step: str) -> dict[str, Any]:
        with closing(user.open(INT8)) as build:
            data = plan_data(build)
        parameters = {part: size for disk in data["disks"] for part, size in disk["parts"].items()}["parameters"]
        return {**next(one for one in data["steps"] if one["step"] == step), "parameters": parameters}

    count, quantize = of("count"), of("quantize")
    assert (count["read"], count["written"], count["seconds"]) == (quantize["written"], quantize["written"], None)
    assert count["parameters"] == 2 * quantize["written"], "both are kept"
    user.build(INT8)
    monkeypatch.setattr(Count, "weight", 3)
    assert of("count")["seconds"] is not None, "it has been done, about a third of the size"


@pytest.mark.usefixtures("_registered")
def test_it_runs_and_the_artifact_is_made_of_its_output(user: UserDirectory) -> None:
    assert {"count", "qualify"} <= set(user.build(INT8))
    assert user.build(INT8) == []
    parameters = stored(user, "package", "manifest.json")["files"]["params/stage-0-rank-0-00001-of-00001.safetensors"]
    with closing(user.open(INT8)) as build:
        outputs = build.run("count").record.outputs
    assert outputs["model.safetensors"].sha256 == parameters["sha256"]
    [file] = (user.artifacts / "latest" / "params").iterdir()
    assert stored(user, "count", "count.json") == len(read_header(file)) > 20


@pytest.mark.usefixtures("_registered")
def test_its_key_is_made_of_what_it_reads_of_its_tools_and_of_its_inputs(
    user: UserDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    user.build(INT8)
    monkeypatch.setattr(Count, "weight", 2)
    assert user.build(INT8) == ["count"], "what it hands on is the same"
    monkeypatch.setattr(keys, "version", lambda package: "9.9" if package == "safetensors" else version(package))
    assert "count" in user.build(INT8)
    assert {"quantize", *WEIGHTS} <= set(user.build("quantization=fp8"))


@pytest.mark.usefixtures("_registered")
def test_it_is_explained(user: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def explained() -> tuple[str, dict[str, Explanation]]:
        with closing(user.open(INT8)) as build:
            found = list(build.explain())
        return explain_text(found), {one.step: one for one in found}

    assert explained()[1]["count"].reason == "never done"
    user.build(INT8)
    assert {one.state for one in explained()[1].values()} == {"up to date"}
    monkeypatch.setattr(Count, "weight", 2)
    text, found = explained()
    assert [step for step, one in found.items() if one.state == "to do"] == ["count"]
    assert re.search(r"^to do +count +changed since it was done\n +weight changed: 1 -> 2$", text, re.MULTILINE)
    assert found["partition:weights"].waits_for == ("count",)


@pytest.mark.grid
def test_it_runs_in_a_worker(user: UserDirectory) -> None:
    with registered(Count(), after="quantize"):
        with steps_in_this_process(), closing(user.open(INT8)) as build:
            for step in ("fetch", "quantize"):
                build.run(step)
        with closing(user.open(INT8)) as build:
            done = build.run("count")
        assert done.ran
        assert stored(user, "count", "count.json") > 20


@pytest.mark.usefixtures("_registered")
def test_it_is_reported(user: UserDirectory) -> None:
    ran = furiosa_build(user, "build", "tiny", INT8, "--json")
    assert ran.status == 0
    events = [json.loads(line) for line in ran.out.splitlines()]
    of_step = [event for event in events if event.get("step") == "count"]
    assert of_step[-1]["seconds"] >= 0
    [report] = user.artifacts.glob("*.build-report.html")
    assert "count" in report.read_text()


def test_a_build_without_it_runs_what_took_its_output(user: UserDirectory) -> None:
    with steps_in_this_process():
        with registered(Count(), after="quantize"), closing(user.open(INT8)) as build:
            run(build)
        assert user.build(INT8) == ["partition:weights", "qualify"], "these take the checkpoint from elsewhere"
