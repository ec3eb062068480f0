"""A built artifact generates text in a process in which nothing of the builder can be imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from furiosa_build.runtime import LLM, SamplingParams

BuildArtifact = Callable[..., Path]

QUICKSTART_MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"

ALONE = """
import sys

ALLOWED = ("runtime", "artifact", "backends", "quant", "core", "ir")
FOREIGN = ("hydra", "omegaconf", "doit", "transformers", "huggingface_hub", "typer", "rich", "yaml")

class Block:
    def find_spec(self, name, path=None, target=None):
        top, _, rest = name.partition(".")
        if top in FOREIGN or (top == "furiosa_build" and rest and rest.split(".")[0] not in ALLOWED):
            raise ImportError(f"{name} is not for the runtime")

sys.meta_path.insert(0, Block())
from furiosa_build.runtime import LLM, SamplingParams
[output] = LLM(sys.argv[1]).generate("It was a", SamplingParams(temperature=0.0, max_tokens=24))
sys.stdout.write(output.outputs[0].text)
"""


def test_text_without_the_builder(build_artifact: BuildArtifact) -> None:
    artifact = build_artifact(QUICKSTART_MODEL)
    alone = subprocess.run(
        [sys.executable, "-c", ALONE, str(artifact)], capture_output=True, text=True, check=True, timeout=120
    )
    [expected] = LLM(artifact).generate("It was a", SamplingParams(temperature=0.0, max_tokens=24))
    assert alone.stdout == expected.outputs[0].text
    assert len(alone.stdout.split()) > 5
