"""Generates from a few fixed prompts and writes what it saw, logits included: `python -m furiosa_build.runtime.probe`.

The build runs this in a fresh process to find out that an artifact works with the runtime alone.
"""

from __future__ import annotations

import math
import sys
from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import save_file

from furiosa_build.artifact.reader import open_artifact
from furiosa_build.artifact.schema import GeneratorConfig
from furiosa_build.core.errors import BuildError
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.sampling.params import SamplingParams

_TEXTS = ("It is a truth universally acknowledged, that", "The answer to the question is", "1 2 3 4 5 6")
_NEW_TOKENS = 16
_PROMPT_TOKENS = 24


def probe(artifact: Path, output: Path) -> None:
    """Writes a safetensors file: for request i `tokens.i` int64 [prompt + new] and `logits.i` float32 [new, vocab].

    The metadata has further figures: `draft_acceptance`, the share of a draft model's tokens that was accepted.
    """
    logits: dict[str, list[torch.Tensor]] = {}
    opened = open_artifact(artifact)
    engine = LLMEngine(
        opened,
        paged_attention_num_blocks=_num_blocks(opened.artifact.generator_config),
        on_logits=lambda request, row: logits.setdefault(request, []).append(row.clone()),
    )
    tokens = {}
    with closing(engine):
        for i, prompt in enumerate(_prompts(engine)):
            engine.add_request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=_NEW_TOKENS, ignore_eos=True))
        while engine.has_unfinished_requests():
            for result in engine.step():
                if result.finished:
                    tokens[result.request_id] = [*result.prompt_token_ids, *result.outputs[0].token_ids]
        accepted = engine.stats().acceptance_rate
    tensors = {f"tokens.{name}": torch.tensor(ids) for name, ids in tokens.items()}
    tensors |= {f"logits.{name}": torch.stack(rows) for name, rows in logits.items()}
    save_file(tensors, output, None if accepted is None else {"draft_acceptance": str(accepted)})


def _prompts(engine: LLMEngine) -> list[list[int]]:
    """Token ids that fit the buckets: of fixed texts, or spread over the vocabulary where there is no tokenizer."""
    longest = _max_prompt_tokens(engine.artifact.generator_config)
    if engine.tokenizer is not None:
        prompts = [engine.tokenizer.encode(text) for text in _TEXTS]
    else:
        size = engine.artifact.model_metadata.vocab_size
        prompts = [[(7919 * (i + 1) * (k + 1)) % size for k in range(8 + 5 * i)] for i in range(len(_TEXTS))]
    return [prompt[:longest] for prompt in prompts]


def _max_prompt_tokens(config: GeneratorConfig) -> int:
    """The number of tokens that a prompt may have."""
    longest = max(length for _, length in config.prefill_buckets)
    return max(1, min(longest, max(length for _, length in config.decode_buckets) - _NEW_TOKENS, _PROMPT_TOKENS))


def _num_blocks(config: GeneratorConfig) -> int:
    """KV blocks to run all prompts side by side. What an artifact suggests may be all the memory of a server."""
    blocks = len(_TEXTS) * -(-(_max_prompt_tokens(config) + _NEW_TOKENS) // config.paged_attention_block_size)
    with_spare = math.ceil(blocks / (1 - config.default_scheduler_config.spare_blocks_ratio))
    return min(config.paged_attention_num_blocks, with_spare)


if __name__ == "__main__":
    try:
        probe(Path(sys.argv[1]), Path(sys.argv[2]))
    except BuildError as error:
        sys.exit(str(error))
