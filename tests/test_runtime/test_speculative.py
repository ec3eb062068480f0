"""Speculative decoding on the toy model: what a draft proposes changes nothing but the number of steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.engine import LLMEngine, StepFailedError
from furiosa_build.runtime.engine_args import AsyncEngineArgs
from furiosa_build.runtime.request import RequestOutput
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.sampling.sampler import distribution

from . import toy
from .stepping import greedy

K = 3
BUCKETS: dict[str, list[tuple[int, ...]]] = {
    "prefill": [(1, 8), (1, 16), (4, 8)],
    "append": [(1, 4, 48), (1, 8, 48), (4, 4, 48)],
    "decode": [(1, 24), (4, 24), (4, 48)],
}
PROMPTS = [[1, 2, 3], [9] * 7, [5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7], [250], list(range(16))]

MakeArtifact = Callable[..., Path]


@pytest.fixture
def make(toy_backend: toy.ToyBackend, tmp_path: Path) -> MakeArtifact:
    """Artifacts by what they are made with."""
    del toy_backend

    def make(noise: float = 0.5, draft: dict[str, Any] | None = None, **options: Any) -> Path:
        directory = tmp_path / f"{noise}-{draft}-{options}".replace("/", "")
        if not directory.exists():
            data = toy.artifact_data(BUCKETS, **options)
            data = toy.with_draft(data, toy.artifact_data(BUCKETS, **(draft or {})), K)
            toy.write_artifact(directory, data, draft_parameters=toy.draft_parameters(noise))
        return directory

    return make


def generate(
    engine: LLMEngine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> tuple[list[RequestOutput], int]:
    """The outputs, and the number of steps. The state is consistent after each, and nothing is left at the end."""
    for i, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(i), prompt, each)
    last: dict[str, RequestOutput] = {}
    steps = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            before = last.get(output.request_id)
            if before is not None:
                assert output.outputs[0].token_ids[: len(before.outputs[0].token_ids)] == before.outputs[0].token_ids
                assert output.outputs[0].text.startswith(before.outputs[0].text)
            last[output.request_id] = output
        engine.check_integrity()
        steps += 1
    [replica] = engine._replicas
    assert replica.drafter is None or not replica.drafter._blocks.owners()
    return [last[str(i)] for i in range(len(prompts))], steps


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=16), min_size=1, max_size=6),
    lengths=st.lists(st.integers(1, 40), min_size=6, max_size=6),
    noise=st.sampled_from([0.0, 0.3, 3.0]),
    block_size=st.sampled_from([1, 4]),
    blocks=st.sampled_from([12, 20, 64]),
    draft_blocks=st.sampled_from([1, 14, 64]),
    chunk=st.sampled_from([None, 3]),
    caching=st.booleans(),
)
@example(  # A preempted one comes back, its whole prompt in the cache, and takes blocks that the next begins with.
    prompts=[[1, *[0] * 5], [2, *[0] * 6], [0], [0] * 4, [0] * 7],
    lengths=[13, 14, 1, 10, 6, 1],
    noise=0.0,
    block_size=1,
    blocks=12,
    draft_blocks=14,
    chunk=None,
    caching=True,
)
def test_greedy_output_is_that_of_the_target(
    make: MakeArtifact,
    prompts: list[list[int]],
    lengths: list[int],
    noise: float,
    block_size: int,
    blocks: int,
    draft_blocks: int,
    chunk: int | None,
    caching: bool,
) -> None:
    """However good the draft, and with too few blocks for all, of either."""
    artifact = make(
        noise,
        {"block_size": block_size, "num_blocks": draft_blocks * 4 // block_size},
        block_size=block_size,
        num_blocks=blocks * 4 // block_size,
        prefill_chunk_size=chunk,
    )
    lengths = lengths[: len(prompts)]
    with closing(LLMEngine(artifact, enable_prefix_caching=caching)) as engine:
        outputs, _ = generate(engine, prompts, [greedy(length) for length in lengths])
    # A decode bucket of 48 tokens gives the 49th.
    expected = [toy.expected(prompt, min(n, 49 - len(prompt))) for prompt, n in zip(prompts, lengths, strict=True)]
    assert tokens_of(outputs) == expected


def test_what_a_draft_costs_and_spares(make: MakeArtifact) -> None:
    with closing(LLMEngine(make(noise=0.0))) as engine:
        _, steps = generate(engine, [PROMPTS[0]], [greedy(1 + 5 * (K + 1))])
        stats = engine.stats()
        assert steps == 1 + 5
        assert (stats.proposals, stats.proposed_tokens, stats.accepted_tokens) == (5, 5 * K, 5 * K)
        assert (stats.acceptance_rate, stats.tokens_per_proposal) == (1, K + 1)
    with closing(LLMEngine(make(noise=100.0))) as engine:
        _, steps = generate(engine, [PROMPTS[0]], [greedy(6)])
        stats = engine.stats()
        # Of 5 steps the last has no use for a proposal, the one before it for one only.
        assert (steps, stats.proposals, stats.proposed_tokens, stats.accepted_tokens) == (6, 4, 3 + 3 + 2 + 1, 0)
        assert (stats.acceptance_rate, stats.tokens_per_proposal) == (0, 1)


def test_the_draft_computes_nothing_twice(make: MakeArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in pieces, then a step for each proposal, and one more where the last of them was accepted."""
    with closing(LLMEngine(make(noise=0.0, prefill_chunk_size=8))) as engine:
        drafter = engine._replicas[0].drafter
        assert drafter is not None
        ran: list[tuple[str, list[int], int]] = []
        run = drafter._executor.run

        def spy(pipeline: str, rows: Sequence[Any]) -> Any:
            ran.extend((pipeline, list(row.tokens), row.start) for row in rows)
            return run(pipeline, rows)

        monkeypatch.setattr(drafter._executor, "run", spy)
        [output], _ = generate(engine, [PROMPTS[4]], [greedy(12)])
    tokens = PROMPTS[4] + output.outputs[0].token_ids
    fed = [token for _, piece, _ in ran for token in piece]
    assert fed == tokens[: len(fed)]
    assert [start for _, _, start in ran] == [0, 8, *range(16, len(fed))]
    assert [name for name, *_ in ran][:3] == ["prefill-1x8", "append-1x8x48", "decode-1x24"]


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 2, "prompt_logprobs": 1},
        {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"logit_bias": {7: 3.0}, "min_tokens": 6, "stop_token_ids": [7]},
        {"stop": "\x05", "min_tokens": 2},
        {"allowed_token_ids": [*range(3, 250, 2)]},
        {"bad_words": [chr(n) for n in range(40, 80)], "truncate_prompt_tokens": 3},
        {"ignore_eos": False, "logit_bias": {toy.EOS: 2.5}},
        {"guided_regex": "[a-f]{3}(xyz)?[0-9]{2,9}"},
    ],
    ids=lambda params: next(iter(params)),
)
def test_parameters_mean_the_same(make: MakeArtifact, params: dict[str, Any]) -> None:
    """All but logprobs exactly; these to float32, as a bucket may round otherwise."""
    if "guided_regex" in params:
        pytest.importorskip("llguidance")
        params = {**params, "ignore_eos": False}
    artifact = make(noise=0.3)
    each = [greedy(20, **params)] * len(PROMPTS)
    with closing(LLMEngine(artifact)) as engine:
        outputs, steps = generate(engine, PROMPTS, each)
        assert engine.stats().accepted_tokens > 0
    plain = AsyncEngineArgs(model=str(artifact), use_speculative_decoding_if_possible=False)
    with closing(LLMEngine.from_engine_args(plain)) as engine:
        expected, plain_steps = generate(engine, PROMPTS, each)
        assert engine.stats().proposals == 0
    assert outputs == expected
    assert steps < plain_steps


TEMPERATURE, TOP_K = 0.6, 3


def joint_distribution(prompt: list[int], number: int) -> dict[tuple[int, ...], float]:
    """Of the first `number` tokens after a prompt, computed without a cache, an engine or a draft."""
    params = SamplingParams(temperature=TEMPERATURE, top_k=TOP_K)
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(number):
        following = {}
        for tokens, probability in found.items():
            weights = distribution(toy.logits_after([*prompt, *tokens]).numpy(), params)
            for id_ in np.flatnonzero(weights).tolist():
                following[*tokens, id_] = probability * float(weights[id_])
        found = following
    return found


@pytest.mark.grid
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_sampling_keeps_the_distribution(make: MakeArtifact, noise: float) -> None:
    """A chi-squared test of all continuations of four tokens: of these two are proposed."""
    number, draws = 4, 4000
    expected = joint_distribution(PROMPTS[0], number)
    counts: Counter[tuple[int, ...]] = Counter()
    with closing(LLMEngine(make(noise), seed=3)) as engine:
        params = SamplingParams(temperature=TEMPERATURE, top_k=TOP_K, max_tokens=number, ignore_eos=True)
        for first in range(0, draws, 60):
            for i in range(first, first + 60):
                engine.add_request(str(i), PROMPTS[0], params)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        counts[tuple(output.outputs[0].token_ids)] += 1
        rate = engine.stats().acceptance_rate
        assert rate is not None
        assert 0.05 < rate < 0.95, "both outcomes are tried"
    assert counts.keys() <= expected.keys()
    assert chi_squared(counts, expected, draws) > 1e-4


def chi_squared(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float], draws: int) -> float:
    """The p-value. Cells of fewer than 5 expected draws are taken together."""
    rare = [cell for cell, probability in expected.items() if probability * draws < 5]
    cells = [[cell] for cell in expected if cell not in rare] + ([rare] if rare else [])
    statistic = 0.0
    for cell in cells:
        mean = draws * sum(expected[each] for each in cell)
        statistic += (sum(counts[each] for each in cell) - mean) ** 2 / mean
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def test_the_chi_squared_test_notices() -> None:
    """Draws from the proposals' distribution do not pass for draws from the target's."""
    expected = joint_distribution(PROMPTS[0], 2)
    other = {cell: 1 / len(expected) for cell in expected}
    generator = np.random.default_rng(1)
    cells = list(expected)
    for weights, passes in ((expected, True), (other, False)):
        probabilities = np.array([weights[cell] for cell in cells])
        drawn = generator.choice(len(cells), size=3000, p=probabilities / probabilities.sum())
        assert (chi_squared(Counter(cells[i] for i in drawn), expected, 3000) > 1e-4) == passes


@pytest.mark.parametrize("blocks", [64, 16])
def test_what_a_seed_gives_does_not_depend_on_others(make: MakeArtifact, blocks: int) -> None:
    """Nor on whether blocks are short, so that requests are preempted."""
    params = [SamplingParams(temperature=0.8, max_tokens=24, seed=i, ignore_eos=True) for i in range(len(PROMPTS))]
    alone = []
    for prompt, each in zip(PROMPTS, params, strict=True):
        with closing(LLMEngine(make(noise=0.3))) as engine:
            alone += generate(engine, [prompt], [each])[0]
    with closing(LLMEngine(make(noise=0.3, num_blocks=blocks))) as engine:
        together, _ = generate(engine, PROMPTS, params)
        assert (engine.stats().preemptions > 0) == (blocks == 16)
        assert engine.stats().accepted_tokens > 0
    assert tokens_of(together) == tokens_of(alone)


@pytest.mark.usefixtures("toy_backend")
def test_proposals_stop_where_no_bucket_takes_them(tmp_path: Path) -> None:
    """Two together have no append bucket, one has."""
    data = toy.artifact_data({**BUCKETS, "append": [(1, 4, 48)]})
    artifact = toy.write_artifact(tmp_path / "narrow", toy.with_draft(data, toy.artifact_data(BUCKETS), K))
    with closing(LLMEngine(artifact)) as engine:
        outputs, _ = generate(engine, PROMPTS[:2], [greedy(20), greedy(8)])
        assert tokens_of(outputs) == [toy.expected(PROMPTS[0], 20), toy.expected(PROMPTS[1], 8)]
        assert 0 < engine.stats().proposals < 5


@pytest.mark.usefixtures("toy_backend")
def test_a_draft_that_fails_ends_its_requests_and_no_others(tmp_path: Path) -> None:
    data = toy.with_draft(toy.artifact_data(BUCKETS), toy.artifact_data(BUCKETS), K)
    broken = toy.draft_parameters(0.0)
    wrong = toy.expected(PROMPTS[0], 6)
    # The state after six tokens of the first request has no logits. After five a KV block of it is known.
    broken["table"][toy.state_after([*PROMPTS[0], *wrong])] = torch.nan
    artifact = toy.write_artifact(tmp_path / "broken", data, draft_parameters=broken)
    with closing(LLMEngine(artifact)) as engine:
        engine.add_request("ends", PROMPTS[0], greedy(12))
        engine.step()
        engine.step()
        with pytest.raises(StepFailedError, match="no usable maximum") as caught:
            generate(engine, [], [])
        assert list(caught.value.errors) == ["ends"]
        drafter = engine._replicas[0].drafter
        assert drafter is not None
        assert drafter._blocks.find_cached([*PROMPTS[0], *wrong], 8) == [], "nobody begins with what it has computed"
        engine.check_integrity()
        outputs, _ = generate(engine, PROMPTS[1:], [greedy(12)] * 4)
        assert tokens_of(outputs) == [toy.expected(prompt, 12) for prompt in PROMPTS[1:]]
        assert engine.stats().kv_blocks_used == 0


def test_arguments_at_load(make: MakeArtifact) -> None:
    model = str(make(noise=0.0))
    for number in (1, 2, 7):
        args = AsyncEngineArgs(
            model=model, num_speculative_tokens=number, speculative_model_paged_attention_num_blocks=20
        )
        with closing(LLMEngine.from_engine_args(args)) as engine:
            [output], _ = generate(engine, [PROMPTS[0]], [greedy(1 + 2 * (number + 1))])
            assert output.outputs[0].token_ids == toy.expected(PROMPTS[0], 1 + 2 * (number + 1))
            assert engine.stats().tokens_per_proposal == number + 1
            drafter = engine._replicas[0].drafter
            assert drafter is not None
            assert drafter._blocks.num_blocks == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_speculative_tokens": 8}, "num_speculative_tokens=8: no append bucket takes so many"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens=0"),
        ({"speculative_model_paged_attention_num_blocks": 0}, "does not take 0"),
        (
            {"num_speculative_tokens": 2, "use_speculative_decoding_if_possible": False},
            "num_speculative_tokens=2: use_speculative_decoding_if_possible is False",
        ),
    ],
)
def test_arguments_that_are_refused(make: MakeArtifact, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AsyncEngineArgs(model=str(make()), **arguments).open()
