"""The runtime's numbers against transformers', from the same files: small random models of every supported family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import grid
from reference import MARGIN, greedy
from test_models.tiny import LLAMA, MODELS, load, read_config, save_random_model
from torch import Tensor

from furiosa_build.runtime import LLM, LLMEngine, SamplingParams

BuildArtifact = Callable[..., Path]
Made = Callable[..., Path]

NEW_TOKENS = 40
PROMPT_LENGTHS = (1, 5, 17, 33, 48)
"""Shorter and longer than the windows (12), the blocks (16) and the smaller prefill bucket (32)."""

GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The directory of a model, in a dtype."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def save(name: str, dtype: torch.dtype = torch.float32) -> Path:
        return save_random_model({**MODELS[name], "dtype": str(dtype)[6:]}, root / f"{name}-{dtype}", dtype)

    return save


def prompts(vocab_size: int = LLAMA["vocab_size"]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def generate(artifact: Path, prompts: list[list[int]]) -> list[list[int]]:
    outputs = LLM(artifact).generate(prompts, GREEDY)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("name", grid(MODELS, ["llama"]))
def test_greedy_tokens_are_identical_in_float32(name: str, saved: Made, build_artifact: BuildArtifact) -> None:
    directory = saved(name)
    model = load(directory)
    expected = [greedy(model, prompt, NEW_TOKENS) for prompt in prompts()]
    # Not one token over and over, which a broken model might get right as well.
    assert len({token for tokens in expected for token in tokens}) > 40
    for block_size in (1, 16):
        artifact = build_artifact(directory, paged_attention_block_size=block_size)
        assert generate(artifact, prompts()) == expected, f"block size {block_size}"


@pytest.mark.grid
def test_requests_that_arrive_while_others_run_give_the_same_tokens(saved: Made, build_artifact: BuildArtifact) -> None:
    artifact = build_artifact(saved("mistral"))
    alone = [generate(artifact, [prompt])[0] for prompt in prompts()]
    engine = LLMEngine(artifact)
    tokens: dict[str, list[int]] = {}
    waiting = list(enumerate(prompts()))
    for step in range(10_000):
        if waiting and step % 7 == 0:  # every request meets others in the middle of theirs
            number, prompt = waiting.pop()
            engine.add_request(str(number), prompt, GREEDY)
        for output in engine.step():
            tokens[output.request_id] = output.outputs[0].token_ids
        engine.check_integrity()
        if not waiting and not engine.has_unfinished_requests():
            break
    assert [tokens[str(number)] for number in range(len(alone))] == alone


def test_a_sequence_that_is_preempted_gives_the_same_tokens(saved: Made, build_artifact: BuildArtifact) -> None:
    artifact = build_artifact(saved("qwen3"))
    roomy = generate(artifact, prompts())
    # One sequence of 88 tokens needs 6 blocks of 16, so five cannot all run at once.
    narrow = LLM(artifact, paged_attention_num_blocks=12).generate(prompts(), GREEDY)
    assert [output.outputs[0].token_ids for output in narrow] == roomy


def runtime_logits(artifact: Path) -> tuple[list[list[int]], list[Tensor]]:
    """Of every prompt: all tokens, and the logits float32 [new tokens, vocab] that the new ones were chosen from."""
    rows: dict[str, list[Tensor]] = {}
    engine = LLMEngine(artifact, on_logits=lambda request, row: rows.setdefault(request, []).append(torch.tensor(row)))
    for number, prompt in enumerate(prompts()[:4]):
        engine.add_request(str(number), prompt, GREEDY)
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    return [tokens[key] for key in sorted(tokens)], [torch.stack(rows[key]) for key in sorted(rows)]


@torch.no_grad()
def logits_of(model: Any, tokens: Sequence[int]) -> Tensor:
    """float32 [tokens, vocab]: what transformers gives after each of `tokens`, in one pass without a cache."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", grid(MODELS, ["llama", "gemma3"]))
def test_logits_are_those_of_transformers(name: str, saved: Made, build_artifact: BuildArtifact) -> None:
    directory = saved(name)
    model = load(directory)
    for tokens, logits in zip(*runtime_logits(build_artifact(directory)), strict=True):
        # float32, with sums of at most 192 terms in another order, through three layers: some hundred units of 2**-24.
        expected = logits_of(model, tokens[:-1])[-NEW_TOKENS:]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.grid
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_logits_are_as_close_to_float32_as_those_of_transformers(
    name: str, saved: Made, build_artifact: BuildArtifact
) -> None:
    """bfloat16 has 8 bits: what matters is that nothing is lost beyond what the format costs anyone.

    So the measure is the distance from the same weights computed in float32. Both sides round after every operation,
    in another order and with other operations fused: their distances are samples of the same noise. Over some ten
    thousand logits its root mean square is steady: ours is 0.91 to 1.00 of theirs. A lost mantissa bit doubles it.
    """
    directory = saved(name, torch.bfloat16)
    exact, rounded = load(directory, torch.float32), load(directory, torch.bfloat16)
    ours, theirs, size = [], [], []
    for tokens, logits in zip(*runtime_logits(build_artifact(directory)), strict=True):
        expected = logits_of(exact, tokens[:-1])[-NEW_TOKENS:]
        ours.append((logits - expected).square().mean())
        theirs.append((logits_of(rounded, tokens[:-1])[-NEW_TOKENS:] - expected).square().mean())
        size.append(expected.square().mean())
    own, other, whole = (float(torch.stack(parts).mean().sqrt()) for parts in (ours, theirs, size))
    assert own < 1.15 * other
    assert other < 0.1 * whole, "the reference itself is noise"


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_prompt_logprobs_are_those_of_transformers(name: str, saved: Made, build_artifact: BuildArtifact) -> None:
    directory = saved(name)
    model = load(directory)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=3, logprobs=0)
    for prompt, output in zip(prompts(), LLM(build_artifact(directory)).generate(prompts(), params), strict=True):
        expected = torch.log_softmax(logits_of(model, prompt), dim=-1)
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        for position, (token, entry) in enumerate(zip(prompt[1:], output.prompt_logprobs[1:], strict=True)):
            assert entry is not None
            assert set(entry) == {token, *expected[position].topk(3).indices.tolist()}
            for candidate, found in entry.items():
                assert found.logprob == pytest.approx(float(expected[position, candidate]), abs=1e-4)
                assert found.rank == 1 + int((expected[position] > expected[position, candidate]).sum())
        first = output.outputs[0].token_ids[0]
        assert output.outputs[0].cumulative_logprob == pytest.approx(float(expected[-1, first]), abs=1e-4)


def test_an_artifact_that_gives_the_last_logits_only_gives_the_same_tokens(
    saved: Made, build_artifact: BuildArtifact
) -> None:
    directory = saved("llama")
    last_only = build_artifact(directory, calculate_logit_only_for_last_token=True)
    assert generate(last_only, prompts()) == generate(build_artifact(directory), prompts())


@pytest.mark.parametrize("scheme", grid(["fp8", "int8"], ["int8"]))
@pytest.mark.parametrize("name", grid(["llama", "tied", "qwen2"], ["llama"]))
def test_a_quantized_artifact_is_the_quantized_checkpoint_in_transformers(
    name: str,
    scheme: str,
    saved: Made,
    build_artifact: BuildArtifact,
    start_build: Callable[..., Any],
    outputs_of: Callable[..., Path],
) -> None:
    """Greedy in float32: the same rounded weights on both sides, so the same tokens.

    The reference runs once over what the artifact said: if each token is the best one after all before it, then it
    would have said the same, token by token, at a fraction of the cost (all weights are unpacked at every step).
    """
    directory = saved(name)
    checkpoint = outputs_of(start_build(directory, scheme=scheme), "quantize")
    assert read_config(checkpoint)["quantization_config"]["quant_method"] == "compressed-tensors"
    model = load(checkpoint)
    found = generate(build_artifact(directory, scheme=scheme), prompts())
    assert found != generate(build_artifact(directory), prompts()), "quantization changes nothing: is it done?"
    for prompt, tokens in zip(prompts(), found, strict=True):
        best = logits_of(model, [*prompt, *tokens[:-1]])[-NEW_TOKENS:].topk(2)
        assert float((best.values[:, 0] - best.values[:, 1]).min()) > MARGIN
        assert tokens == best.indices[:, 0].tolist()
