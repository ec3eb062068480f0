"""This project: backend native. Formats: bf16 and the names of conf/quantization, perhaps with `-head-int8`."""

import json
import os
import subprocess
import sys
from pathlib import Path

from common import MARGIN, Generate, Task, main, step_through


def prepare(task: Task) -> None:
    """An artifact with a prefill bucket for each prompt and decode buckets for all contexts, in a store of its own."""
    lengths = [length for length in (128, 640, 2560) if length < task.longest]
    lengths.append(-(-task.longest // 128) * 128)
    quantization, _, head = task.format.partition("-head-")
    recipe = {
        "defaults": [
            "base",
            {"quantization": "none" if quantization == "bf16" else quantization},
            {"override backend": "native"},
        ],
        "quantization": {"lm_head": head or None},
        "model": {"model_id_or_path": str(task.model), "calculate_logit_only_for_last_token": True},
        "buckets": {
            "max_seq_len_to_capture": lengths[-1],
            "prefill_buckets": [[1, length] for length in task.prompts],
            "decode_buckets": [
                [batch, length] for batch in (1, 8, 32) for length in lengths if batch * length <= 32768
            ],
        },
        # The weights are random: rounding them changes the text more than that of a real model.
        "qualify": {"max_kl_divergence": 100, "min_top1_agreement": 0, "max_perplexity_ratio": 1e9},
    }
    (task.work / "recipes").mkdir(exist_ok=True)
    (task.work / "recipes" / "peer.yaml").write_text(json.dumps(recipe))
    command = [Path(sys.executable).parent / "furiosa-build", "build", "peer"]
    environment = {**os.environ, "FURIOSA_BUILD_CACHE": str(task.work / "store")}
    subprocess.run(command, cwd=task.work, env=environment, check=True, stdout=sys.stderr)


def load(task: Task) -> Generate:
    from furiosa_build.runtime import EngineArgs, LLMEngine, SamplingParams

    engine = LLMEngine.from_engine_args(EngineArgs(model=str(task.work / "artifacts" / "peer" / "latest")))
    numbers = iter(range(1 << 30))

    def generate(prompts, steps):
        params = SamplingParams(temperature=0, max_tokens=steps + MARGIN, ignore_eos=True)
        names = [str(next(numbers)) for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        yield from step_through(engine, names, steps)

    return generate


main(load, prepare)
