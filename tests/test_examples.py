"""The examples, run as processes in the way that the API's documents run theirs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from grid import grid

from furiosa_build.runtime import LLM, SamplingParams

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICKSTART_MODEL = EXAMPLES / "quickstart" / "model"


def run(example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(EXAMPLES / example), *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("example", grid(["llm_engine.py", "async_llm_engine.py"], ["async_llm_engine.py"]))
def test_an_example(example: str, build_artifact: Callable[..., Path]) -> None:
    artifact = build_artifact(QUICKSTART_MODEL, backend="native")
    ran = run(example, "--model", str(artifact), "--devices", "cpu", "--data-parallel-size", "2", "--seed", "3")
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = sorted(ran.stdout.splitlines())
    assert [line.partition(" -> ")[0] for line in lines] == [
        "request 0: 'A robot may not injure a human being'",
        "request 1: 'To be or not to be,'",
        "request 2: 'It is only the heart'",
    ]
    # The one that both examples draw in the same way, and that depends on no seed of the engine's.
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=24)
    [expected] = LLM(artifact).generate("It is only the heart", params)
    assert lines[2].endswith(f" -> {expected.outputs[0].text!r}")
    assert len(expected.outputs[0].text.split()) > 5


@pytest.mark.parametrize("example", ["llm_engine.py", "async_llm_engine.py"])
def test_an_example_has_the_engine_s_options(example: str) -> None:
    helped = run(example, "--help")
    assert helped.returncode == 0
    for option in ("--model MODEL", "--max-processing-samples", "--paged-attention-num-blocks"):
        assert option in helped.stdout
