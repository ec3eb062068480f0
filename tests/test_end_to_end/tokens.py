"""The tokens that follow prompts: by transformers, and by an engine from an artifact of the same model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reference import greedy
from test_models.tiny import load, save_random_model
from user_directory import UserDirectory, make_user_directory

from furiosa_build.quant.scheme import scheme as find_scheme
from furiosa_build.recipe.schema import Scheme
from furiosa_build.runtime import LLMEngine, SamplingParams

Prompts = Sequence[list[int]]


def make_users(root: Path, models: Mapping[str, dict[str, Any]]) -> dict[str, UserDirectory]:
    """A directory for each model, with a store of its own."""
    return {
        name: make_user_directory(root / name, root / f"{name}-store", save_random_model(config, root / "m" / name))
        for name, config in models.items()
    }


def expected_tokens(user: UserDirectory, prompts: Prompts, new: int, scheme: Scheme = "none") -> list[list[int]]:
    """By transformers, greedily; weights that `scheme` quantizes are dequantized."""
    model = load(user.root / "tiny")
    for path, parameter in model.named_parameters() if scheme != "none" else ():
        if path.endswith("_proj.weight"):
            own = find_scheme(scheme)
            parameter.data = own.dequantize(own.quantize(parameter.data), parameter.dtype)
    return [greedy(model, prompt, new) for prompt in prompts]


def generated_tokens(engine: LLMEngine, prompts: Prompts, new: int) -> list[list[int]]:
    """By the engine, which has all prompts at once. Its internal state is consistent after every step."""
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))
    found: dict[int, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                found[int(output.request_id)] = list(output.outputs[0].token_ids)
        engine.check_integrity()
    return [found[number] for number in range(len(prompts))]
