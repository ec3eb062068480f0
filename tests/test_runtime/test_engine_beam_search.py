"""Beam search by the engine. (test_end_to_end compares its results with transformers'.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.sampling.params import SamplingParams

from . import toy
from .stepping import drain, run


@pytest.fixture
def for_beams(toy_backend: toy.ToyBackend, tmp_path: Path) -> LLMEngine:
    """An engine for searches of 2 beams of up to 6 tokens."""
    del toy_backend
    buckets = {"prefill": [(1, 8), (2, 16)], "append": [(1, 8, 24)], "decode": [(2, 24), (4, 24)]}
    return LLMEngine(toy.write_artifact(tmp_path / "beams", toy.artifact_data(buckets, beams=(2, 6))), seed=1)


def beams(max_tokens: int | None = 6, **others: Any) -> SamplingParams:
    return SamplingParams(use_beam_search=True, max_tokens=max_tokens, **{"n": 2, "ignore_eos": True, **others})


def test_beams_by_exhaustion(for_beams: LLMEngine) -> None:
    """Two tokens long: the best of all continuations that begin with one of the two likeliest tokens."""
    prompt = [1, 2, 3]
    first = toy.logits_after(prompt).log_softmax(-1).topk(2)
    totals = {}
    for token, logprob in zip(first.indices.tolist(), first.values, strict=True):
        for last, more in enumerate(toy.logits_after([*prompt, token]).log_softmax(-1)):
            totals[token, last] = float(logprob + more)
    best = sorted(totals, key=lambda pair: -totals[pair])[:2]
    output = run(for_beams, prompt, beams(2))
    assert [tuple(completion.token_ids) for completion in output.outputs] == best
    for index, completion in enumerate(output.outputs):
        assert completion.index == index
        assert completion.cumulative_logprob == pytest.approx(totals[best[index]], abs=1e-4)
        assert completion.text == bytes(best[index]).decode(errors="replace")
        assert (completion.finish_reason, completion.stop_reason, completion.logprobs) == ("length", None, None)


def test_a_beam_search_has_one_output_at_its_end(for_beams: LLMEngine) -> None:
    for_beams.add_request("b", [1, 2, 3], beams(4, n=1))
    steps = []
    while for_beams.has_unfinished_requests():
        steps.append(for_beams.step())
        for_beams.check_integrity()
    assert [len(outputs) for outputs in steps] == [0, 0, 0, 1]
    assert len(steps[-1][0].outputs) == 1


def test_an_end_token_of_a_beam(for_beams: LLMEngine) -> None:
    plain = run(for_beams, [1, 2, 3], beams(6)).outputs[0]
    end = plain.token_ids[2]
    ended = next(c for c in run(for_beams, [1, 2, 3], beams(6, stop_token_ids=[end])).outputs if end in c.token_ids)
    assert (ended.finish_reason, ended.stop_reason) == ("stop", end)
    assert ended.token_ids.index(end) == len(ended.token_ids) - 1
    assert ended.text == bytes(ended.token_ids[:-1]).decode(errors="replace")


def test_beams_reach_the_end_of_the_context(for_beams: LLMEngine) -> None:
    """A prompt of 22 tokens, in pieces: 2 more fit in the context of 24, and a last that is never run."""
    params = beams(None, prompt_logprobs=0)
    output = run(for_beams, [3] * 22, params)
    assert [len(completion.token_ids) for completion in output.outputs] == [3, 3]
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 22
    assert len(run(for_beams, [3] * 5, params).outputs[0].token_ids) == 6, "the artifact's max_new_tokens"


def test_a_beam_search_is_aborted(for_beams: LLMEngine) -> None:
    alone = run(for_beams, [4, 5], beams())
    for name, prompt in (("a", [1, 2, 3]), ("r", [4, 5]), ("c", [6] * 20)):
        for_beams.add_request(name, prompt, beams())
    for _ in range(3):
        for_beams.step()
    for_beams.abort_request(["a", "c"])
    for_beams.check_integrity()
    assert drain(for_beams) == {"r": alone}
    blocks = for_beams._replicas[0].scheduler.blocks
    assert blocks.num_free == blocks.num_blocks


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (beams(7), "max_tokens does not take 7 here(.|\n)*at most 6"),
        (beams(n=3), "n does not take 3 here(.|\n)*at most 2, the artifact's beam width"),
        (beams(best_of=3), "best_of does not take 3 here(.|\n)*2, the artifact's beam width"),
    ],
)
def test_beams_that_the_artifact_is_not_for(for_beams: LLMEngine, params: SamplingParams, message: str) -> None:
    with pytest.raises(UserError, match=message):
        for_beams.add_request("r", [1], params)
    for_beams.check_integrity()


def test_artifacts_without_buckets_for_beams(engine: LLMEngine, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the artifact is not built for beam search"):
        engine.add_request("r", [1], beams())
    for decode in ([(2, 24), (3, 24)], []):
        data = toy.artifact_data({"prefill": [(1, 8)], "decode": decode}, beams=(2, 6))
        with pytest.raises(UserError, match=r"is for beams of 2, and its decode buckets are (decode-2x24, |none)"):
            LLMEngine(toy.write_artifact(tmp_path / str(len(decode)), data))
