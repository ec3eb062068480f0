from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from alone import alone

from furiosa_build.build import workers
from furiosa_build.build.workers import run_here
from furiosa_build.core.errors import StepError

SIZE = 64 * 2**20


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A step called `made_up`; a test gives it its `run`."""
    module = ModuleType("furiosa_build.steps.made_up")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells private memory from mapped files")
@alone
def test_a_step_reports_the_memory_it_took() -> None:
    def run(request: dict[str, Any], output: Path) -> None:
        (output / "made").write_bytes(bytearray(b"x") * request["size"])

    step = sys.modules["furiosa_build.steps.made_up"] = ModuleType("furiosa_build.steps.made_up")
    step.run = run  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as output:
        small, large = (run_here("made_up", {"size": size}, Path(output)).peak for size in (1, SIZE))
    assert small is not None
    assert large is not None
    assert SIZE <= large.private - small.private < 2 * SIZE
    assert small.mapped > 0


def test_a_step_that_fails_by_a_step_error_keeps_its_cause(step: ModuleType, tmp_path: Path) -> None:
    def run(request: dict[str, Any], output: Path) -> None:
        del request, output
        raise StepError("made_up", "the artifact does not run", "LOG")

    step.run = run  # type: ignore[attr-defined]
    outcome = workers._work("made_up", "made_up", {}, tmp_path, tmp_path / "log", None)
    assert outcome == ("failed", "the artifact does not run"), "the pool names step and log once"
