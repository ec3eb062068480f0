"""An artifact of backend native runs where there is no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from grid import grid

from furiosa_build.runtime import LLM, SamplingParams

from .graphs import model

PROGRAM = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "hydra", "omegaconf", "doit"):
            raise ImportError(f"{name} is not for the runtime")

sys.meta_path.insert(0, Refuse())
import furiosa_build.server.serve
from furiosa_build.runtime import LLM, SamplingParams
llm = LLM(sys.argv[1])
prompts, settings = map(json.loads, sys.argv[2:])
outputs = [llm.generate(prompts, SamplingParams(**setting)) for setting in settings]
assert "torch" not in sys.modules
print(json.dumps([[output.outputs[0].token_ids for output in some] for some in outputs]))
"""
PROMPTS = [[5, 9, 100, 42], [7] * 20]
BUCKETS = {"prefill_buckets": [[1, 32]], "decode_buckets": [[2, 64]], "max_seq_len_to_capture": 64}
SETTINGS = [{"temperature": 0, "max_tokens": 12, "ignore_eos": True}, {"seed": 3, "max_tokens": 12, "ignore_eos": True}]


@pytest.mark.parametrize("ranks", grid([1, 2], [1]))
def test_texts_are_those_of_the_eager_backend_with_torch(build_artifact: Callable[..., Path], ranks: int) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 256, "bos_token_id": 0}
    config |= {"eos_token_id": 1, "pad_token_id": 2, **model("llama", vocab_size=192)}
    parallel = {"tensor_parallel_size": ranks}
    llm = LLM(build_artifact(config, backend="eager", parallel=parallel, **BUCKETS))
    expected = [llm.generate(PROMPTS, SamplingParams(**setting)) for setting in SETTINGS]
    artifact = build_artifact(config, backend="native", parallel=parallel, **BUCKETS)
    arguments = [str(artifact), json.dumps(PROMPTS), json.dumps(SETTINGS)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], check=True, capture_output=True, text=True, timeout=300
    )
    assert json.loads(done.stdout) == [[output.outputs[0].token_ids for output in some] for some in expected]
