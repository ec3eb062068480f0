"""The engine on the toy model, whose text is wrong as soon as a slot, a position or a batch mate's row is wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from furiosa_build.artifact.reader import OpenArtifact
from furiosa_build.core.errors import UserError
from furiosa_build.runtime.engine import LLMEngine, StepFailedError
from furiosa_build.runtime.request import RequestOutput
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.sampling.sampler import Floats
from furiosa_build.runtime.scheduling.scheduler import Scheduler

from . import toy
from .stepping import drain, greedy, run, tokens_of

PROMPTS = [[1, 2, 3], [9] * 7, [5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7], [250], list(range(16))]


def test_greedy_tokens_are_the_models(engine: LLMEngine) -> None:
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), prompt, greedy())
    assert tokens_of(drain(engine)) == [toy.expected(prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("block_size", [1, 16])
def test_block_sizes_and_artifacts_of_the_last_logits_only(
    toy_backend: toy.ToyBackend, tmp_path: Path, last_only: bool, block_size: int
) -> None:
    del toy_backend
    data = toy.artifact_data(last_only=last_only, block_size=block_size)
    engine = LLMEngine(toy.write_artifact(tmp_path / "a", data))
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), prompt, greedy())
    assert tokens_of(drain(engine)) == [toy.expected(prompt, 12) for prompt in PROMPTS]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), num_blocks=st.integers(7, 30))
def test_outputs_depend_neither_on_arrival_nor_on_the_pool(
    opened: OpenArtifact, data: st.DataObject, num_blocks: int
) -> None:
    """Greedy and seeded, with requests that come in between steps, and pools so small that some are preempted."""
    engine = LLMEngine(opened, paged_attention_num_blocks=num_blocks, seed=1)
    params = [greedy(), SamplingParams(max_tokens=12, ignore_eos=True), SamplingParams(max_tokens=9, seed=4)]
    jobs = {f"{p}{k}": (PROMPTS[p], params[k]) for p in range(5) for k in range(3)}
    names = data.draw(st.lists(st.sampled_from(sorted(jobs)), unique=True, min_size=1, max_size=6))
    got: dict[str, RequestOutput] = {}
    for name in names:
        engine.add_request(name, *jobs[name])
        for _ in range(data.draw(st.integers(0, 4))):
            got |= {output.request_id: output for output in engine.step()}
    got |= drain(engine)
    for name in names:
        alone = LLMEngine(opened, seed=1)
        alone.add_request(name, *jobs[name])
        assert got[name] == drain(alone)[name]


def test_a_preempted_request_goes_on_as_if_nothing_had_happened(
    opened: OpenArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted = []
    original = Scheduler.preempt

    def spy(self: Scheduler, request: Any) -> None:
        preempted.append((request.request_id, len(request.tokens)))
        original(self, request)

    monkeypatch.setattr(Scheduler, "preempt", spy)
    params = SamplingParams(max_tokens=24, logprobs=1, ignore_eos=True)

    def outputs(num_blocks: int) -> dict[str, RequestOutput]:
        engine = LLMEngine(opened, paged_attention_num_blocks=num_blocks, seed=3)
        for name in "ab":
            engine.add_request(name, [1, 2, 3], params)
        return drain(engine)

    roomy = outputs(64)
    assert not preempted
    tight = outputs(7)
    assert max(length for _, length in preempted) > 8  # longer than its prefill bucket
    assert tight == roomy


def test_a_prompt_as_text(engine: LLMEngine) -> None:
    output = run(engine, "abc", greedy(4))
    assert output.prompt == "abc"
    assert output.prompt_token_ids == list(b"abc")
    assert output.outputs[0].token_ids == toy.expected(b"abc", 4)
    assert output.outputs[0].text == bytes(output.outputs[0].token_ids).decode(errors="replace")


def test_seeds(opened: OpenArtifact) -> None:
    def sampled(engine_seed: int | None, name: str = "r", seed: int | None = None) -> list[int]:
        engine = LLMEngine(opened, seed=engine_seed)
        engine.add_request(name, [1], SamplingParams(max_tokens=20, ignore_eos=True, seed=seed))
        return drain(engine)[name].outputs[0].token_ids

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
    assert sampled(1, "a") != sampled(1, "b")
    assert sampled(1, "a", seed=7) == sampled(2, "b", seed=7)
    assert sampled(None) != sampled(None)


def test_penalties_see_the_output_and_not_the_prompt(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    del toy_backend
    parameters = toy.default_parameters() | {"table": torch.zeros(toy.P, toy.VOCAB)}
    parameters["table"][:, 5:8] = torch.tensor([10.0, 9.0, 8.0])
    engine = LLMEngine(toy.write_artifact(tmp_path / "a", parameters=parameters))
    assert run(engine, [5], greedy(3)).outputs[0].token_ids == [5, 5, 5]
    # 5 falls to 8.5, 6 to 7.5, 5 (twice) to 8, which ties with 7 and comes before it, then to 7.5.
    params = greedy(6, presence_penalty=1.0, frequency_penalty=0.5)
    assert run(engine, [5], params).outputs[0].token_ids == [5, 6, 5, 5, 7, 5]
    # The repetition penalty sees the prompt too: 10 / 2 and 9 / 2 lose to 8, and then 8 / 2 to 10 / 2.
    params = greedy(2, repetition_penalty=2.0)
    assert run(engine, [5, 6], params).outputs[0].token_ids == [7, 5]


# Logits and log probabilities


def test_on_logits_sees_every_position_that_is_sampled_from(opened: OpenArtifact) -> None:
    seen: list[tuple[str, Floats]] = []
    engine = LLMEngine(opened, on_logits=lambda name, logits: seen.append((name, logits)))
    tokens = run(engine, [1, 2], greedy(4)).outputs[0].token_ids
    assert [name for name, _ in seen] == ["r"] * 4
    for count, (_, logits) in enumerate(seen):
        assert logits.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(logits), toy.logits_after([1, 2, *tokens[:count]]))


def test_logprobs_are_the_models_own(engine: LLMEngine) -> None:
    params = SamplingParams(max_tokens=3, logprobs=2, temperature=2.0, repetition_penalty=5.0, ignore_eos=True)
    output = run(engine, [1, 2], params).outputs[0]
    assert output.logprobs is not None
    total = 0.0
    for count, entry in enumerate(output.logprobs):
        logprobs = toy.logits_after([1, 2, *output.token_ids[:count]]).log_softmax(-1)
        best = logprobs.topk(2).indices.tolist()
        assert set(entry) == {output.token_ids[count], *best}
        for token, logprob in entry.items():
            assert math.isclose(logprob.logprob, float(logprobs[token]), rel_tol=1e-5)
            assert logprob.rank == int((logprobs > logprobs[token]).sum()) + 1
            assert logprob.decoded_token == bytes([token]).decode(errors="replace")
        total += entry[output.token_ids[count]].logprob
    assert output.cumulative_logprob == pytest.approx(total)
    assert run(engine, [1, 2], greedy(1)).outputs[0].logprobs is None


def test_prompt_logprobs(engine: LLMEngine) -> None:
    prompt = [5, 6, 7, 8]
    got = run(engine, prompt, greedy(2, prompt_logprobs=1)).prompt_logprobs
    assert got is not None
    assert len(got) == 4
    assert got[0] is None
    for place, entry in enumerate(got[1:], start=1):
        assert entry is not None
        logprobs = toy.logits_after(prompt[:place]).log_softmax(-1)
        assert set(entry) == {prompt[place], int(logprobs.argmax())}
        assert math.isclose(entry[prompt[place]].logprob, float(logprobs[prompt[place]]), rel_tol=1e-5)


def test_a_request_for_no_tokens_computes_its_prompt_and_leaves_its_blocks(for_hits: Path) -> None:
    engine = LLMEngine(for_hits)
    prompt = list(range(16))
    engine.add_request("beside", [3, 4], greedy(5))
    engine.add_request("r", prompt, greedy(0, prompt_logprobs=0, logprobs=0))
    outputs = drain(engine)
    assert outputs["beside"].outputs[0].token_ids == toy.expected([3, 4], 5)
    [output] = outputs["r"].outputs
    assert (output.token_ids, output.text, output.logprobs, output.finish_reason) == ([], "", [], "length")
    assert outputs["r"].prompt_logprobs == run(engine, prompt, greedy(1, prompt_logprobs=0)).prompt_logprobs
    assert run(engine, [*prompt, 7], greedy(0)).num_cached_tokens == 16


def test_a_prompt_whose_logits_are_nan_is_an_error_of_its_own(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    del toy_backend
    parameters = toy.default_parameters()
    parameters["table"][:] = torch.nan
    engine = LLMEngine(toy.write_artifact(tmp_path / "a", parameters=parameters))
    engine.add_request("r", [1, 2], greedy(0, prompt_logprobs=0))
    with pytest.raises(StepFailedError, match="no usable maximum"):
        engine.step()
    assert not engine.has_unfinished_requests()


# Prompts in pieces


IN_PIECES = {"prefill": [(1, 8), (2, 8)], "append": [(1, 4, 48), (2, 8, 24)], "decode": [(4, 24), (2, 48)]}


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 8])
def test_a_prompt_in_pieces_gives_the_same_tokens(
    toy_backend: toy.ToyBackend, tmp_path: Path, last_only: bool, block_size: int, chunk_size: int | None
) -> None:
    del toy_backend
    data = toy.artifact_data(IN_PIECES, last_only=last_only, block_size=block_size, prefill_chunk_size=chunk_size)
    engine = LLMEngine(toy.write_artifact(tmp_path / "a", data))
    prompts = [*PROMPTS, list(range(40)), [7] * 23]
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, greedy(8))
    assert tokens_of(drain(engine)) == [toy.expected(prompt, 8) for prompt in prompts]


def test_is_offline_orders_the_requests_and_changes_no_text(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    """Of an artifact's own default: six prompts come in, the batch of four takes the longest of them."""
    del toy_backend
    prompts, batches = [[n] * n for n in (3, 8, 2, 7, 6, 5)], {}
    for is_offline in (False, True):
        data = toy.artifact_data({"prefill": [(4, 8)], "decode": [(4, 24)]}, is_offline=is_offline)
        engine = LLMEngine(toy.write_artifact(tmp_path / str(is_offline), data))
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), prompt, greedy(4))
        batches[is_offline] = [len(output.prompt_token_ids) for output in engine.step()]
        assert tokens_of(drain(engine)) == [toy.expected(prompt, 4) for prompt in prompts]
    assert batches == {False: [3, 8, 2, 7], True: [8, 7, 6, 5]}


def test_prompt_logprobs_of_a_prompt_in_pieces(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    """Also of those whose prompt is computed twice, because they were preempted."""
    del toy_backend
    prompts, params = [[1] * 9, list(range(20)), [5, 6, 7]], greedy(12, prompt_logprobs=1)

    def logprobs(chunk_size: int | None, num_blocks: int, buckets: Any) -> list[Any]:
        data = toy.artifact_data(buckets, block_size=1, num_blocks=num_blocks, prefill_chunk_size=chunk_size)
        engine = LLMEngine(toy.write_artifact(tmp_path / f"{chunk_size} {num_blocks}", data))
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), prompt, params)
        outputs = drain(engine)
        return [outputs[str(number)].prompt_logprobs for number in range(3)]

    whole = logprobs(None, 200, {**toy.DEFAULT_BUCKETS, "prefill": [(1, 24)]})
    assert [len(each) for each in whole] == [9, 20, 3]
    assert logprobs(4, 200, IN_PIECES) == whole
    assert logprobs(5, 36, IN_PIECES) == whole


# Prompts that begin alike


def test_cached_tokens_are_reported(for_hits: Path) -> None:
    prompts = [list(range(16)), [*range(12), 99], [*range(16), *toy.expected(range(16), 12)]]
    cached = {}
    for enabled in (True, False):
        engine = LLMEngine(for_hits, enable_prefix_caching=enabled)
        outputs = [run(engine, prompt, greedy()) for prompt in prompts]
        assert [output.outputs[0].token_ids for output in outputs] == [toy.expected(prompt, 12) for prompt in prompts]
        cached[enabled] = [output.num_cached_tokens for output in outputs]
        stats = engine.stats()
        assert (stats.prompt_tokens, stats.cached_tokens) == (16 + 13 + 28, sum(cached[enabled]))
        assert (stats.running, stats.waiting, stats.preemptions) == (0, 0, 0)
        assert (stats.kv_blocks_used, stats.kv_blocks) == (0, 64)
    assert cached == {True: [0, 12, 24], False: [0, 0, 0]}


def test_stats_are_of_all_replicas(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    del toy_backend
    data = toy.artifact_data(block_size=1)
    data["parallel_config"]["data_parallel_size"] = 2
    engine = LLMEngine(toy.write_artifact(tmp_path / "two", data))
    for number, name in enumerate("abc"):
        engine.add_request(name, [number] * 3, greedy())
    assert engine.stats().waiting == 3
    engine.step()
    stats = engine.stats()
    assert (stats.running + stats.waiting, stats.kv_blocks) == (3, 128)
    assert stats.kv_blocks_used == stats.prompt_tokens == 3 * stats.running
    drain(engine)
    buckets = engine.stats().buckets
    assert list(buckets) == [pipeline.name for pipeline in engine.artifact.pipelines]
    assert sum(use.tokens for use in buckets.values()) == 3 * (3 + 11)
    engine.close()


def test_random_numbers_do_not_depend_on_hits(for_hits: Path) -> None:
    """Nor on giving way, with hits: the same tokens for one seed."""
    params = SamplingParams(max_tokens=20, ignore_eos=True, seed=7, logprobs=1)

    def sampled(enabled: bool, num_blocks: int) -> list[Any]:
        engine = LLMEngine(for_hits, paged_attention_num_blocks=num_blocks, enable_prefix_caching=enabled)
        for number in range(6):
            engine.add_request(str(number), [*range(12), number], params)
        outputs = drain(engine)
        preemptions.append(engine.stats().preemptions)
        return [outputs[str(number)].outputs for number in range(6)]

    preemptions: list[int] = []
    alike = [sampled(enabled, num_blocks) for enabled in (False, True) for num_blocks in (64, 12)]
    assert all(each == alike[0] for each in alike)
    assert preemptions[0] == preemptions[2] == 0
    assert min(preemptions[1], preemptions[3]) > 0


# Refusals


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], greedy(), "the prompt is empty"),
        ("", greedy(), "the prompt is empty"),
        ([1, toy.VOCAB], greedy(), "258 is not a token id"),
        ([-1], greedy(), "-1 is not a token id"),
        ([1.0], greedy(), "1.0 is not a token id"),
        ([1] * 17, greedy(), "17 tokens, more than any prefill or append bucket"),
        ([1], greedy(stop_token_ids=[toy.VOCAB]), "258 is not a token id"),
        ([1], None, "NoneType is not a SamplingParams"),
    ],
)
def test_requests_that_are_refused_leave_nothing(engine: LLMEngine, prompt: Any, params: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine.add_request("r", prompt, params)
    assert not engine.has_unfinished_requests()
    engine.check_integrity()
    engine.add_request("r", [1], greedy())  # the id is still free


def test_request_ids_are_unique_while_in_use(engine: LLMEngine) -> None:
    engine.add_request("r", [1], greedy())
    with pytest.raises(UserError, match="'r' is in use"):
        engine.add_request("r", [1], greedy())
    drain(engine)
    engine.add_request("r", [1], greedy())


def test_too_many_requests(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    del toy_backend
    data = toy.artifact_data(max_processing_samples=2)
    engine = LLMEngine(toy.write_artifact(tmp_path / "a", data))
    engine.add_request("a", [1], greedy())
    engine.add_request("b", [1], greedy())
    assert engine.is_full
    with pytest.raises(UserError, match="2 requests are under way"):
        engine.add_request("c", [1], greedy())
    drain(engine)
    engine.add_request("c", [1], greedy())


def test_prompt_logprobs_need_all_logits(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    del toy_backend
    engine = LLMEngine(toy.write_artifact(tmp_path / "a", toy.artifact_data(last_only=True)))
    with pytest.raises(UserError, match="logits of the last token only"):
        engine.add_request("r", [1], greedy(prompt_logprobs=0))


def test_an_artifact_without_tokenizer_takes_and_gives_token_ids(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    del toy_backend
    engine = LLMEngine(toy.write_artifact(tmp_path / "a", tokenizer=False))
    output = run(engine, [1, 2], greedy(3, logprobs=0)).outputs[0]
    assert (output.token_ids, output.text) == (toy.expected([1, 2], 3), "")
    assert output.logprobs is not None
    assert output.logprobs[0][output.token_ids[0]].decoded_token is None
    for prompt, params in (("text", greedy()), ([1], greedy(stop="x"))):
        with pytest.raises(UserError, match="has no tokenizer"):
            engine.add_request("r", prompt, params)
    with pytest.raises(UserError, match="has no tokenizer"):
        engine.require_tokenizer()


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_the_pool_has_blocks(opened: OpenArtifact, num_blocks: int) -> None:
    with pytest.raises(UserError, match="KV blocks"):
        LLMEngine(opened, paged_attention_num_blocks=num_blocks)


def test_abort(engine: LLMEngine) -> None:
    for name in "abcde":
        engine.add_request(name, [1, 2, 3], greedy())
    engine.step()
    engine.abort_request("a")  # runs
    engine.abort_request(["e", "d", "unknown"])  # wait
    engine.check_integrity()
    outputs = drain(engine)
    assert sorted(outputs) == ["b", "c"]
    assert tokens_of(outputs) == [toy.expected([1, 2, 3], 12)] * 2
