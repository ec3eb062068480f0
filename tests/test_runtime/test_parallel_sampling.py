"""Several completions of one prompt."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.async_engine import AsyncLLMEngine
from furiosa_build.runtime.engine import LLMEngine, StepFailedError
from furiosa_build.runtime.llm import LLM
from furiosa_build.runtime.request import RequestOutput
from furiosa_build.runtime.sampling.params import SamplingParams

from . import toy
from .stepping import greedy

PROMPT = [1, 2, 3]


def sampled(n: int, **others: object) -> SamplingParams:
    return SamplingParams(**{"n": n, "max_tokens": 8, "ignore_eos": True, "temperature": 2.0, **others})  # type: ignore[arg-type]


def drain(engine: LLMEngine) -> dict[str, RequestOutput]:
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.request_id not in last or not last[output.request_id].finished
            last[output.request_id] = output
        engine.check_integrity()
    return last


def tokens_of(output: RequestOutput) -> list[list[int]]:
    assert output.finished
    assert [each.index for each in output.outputs] == list(range(len(output.outputs)))
    return [each.token_ids for each in output.outputs]


def test_n_completions_are_one_output(toy_artifact: Path) -> None:
    outputs = LLM(toy_artifact, seed=1).generate([PROMPT, [7]], [sampled(3, seed=5), sampled(1)])
    first = tokens_of(outputs[0])
    assert len(first) == len({tuple(tokens) for tokens in first}) == 3
    assert len(tokens_of(outputs[1])) == 1
    again = LLM(toy_artifact, seed=2).generate(PROMPT, sampled(2, seed=5))
    assert tokens_of(again[0]) == first[:2]
    alone = LLM(toy_artifact).generate(PROMPT, sampled(1, seed=5))
    assert tokens_of(alone[0]) == first[:1]


def test_without_a_seed_they_differ_and_come_from_the_engines(toy_artifact: Path) -> None:
    def texts(seed: int) -> list[list[int]]:
        return tokens_of(LLM(toy_artifact, seed=seed).generate(PROMPT, sampled(4))[0])

    assert texts(1) == texts(1) != texts(2)
    assert len({tuple(tokens) for tokens in texts(1)}) == 4


def test_log_probabilities_of_the_prompt_are_computed_once(engine: LLMEngine) -> None:
    engine.add_request("r", PROMPT, greedy(3, n=2, prompt_logprobs=1, logprobs=0))
    output = drain(engine)["r"]
    assert tokens_of(output) == [toy.expected(PROMPT, 3)] * 2
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 3
    assert all(each.logprobs is not None and len(each.logprobs) == 3 for each in output.outputs)


def test_ids_and_ends(engine: LLMEngine) -> None:
    engine.add_request("r", PROMPT, sampled(2))
    for id_ in ("r", "0_r"):
        with pytest.raises(UserError, match="is in use"):
            engine.add_request(id_, PROMPT, sampled(1))
    engine.step()
    engine.abort_request("r")
    assert not engine.has_unfinished_requests()
    engine.add_request("r", PROMPT, sampled(2))
    assert len(drain(engine)["r"].outputs) == 2
    engine.add_request("r", PROMPT, greedy(2))
    assert drain(engine)["r"].outputs[0].token_ids == toy.expected(PROMPT, 2)


def test_when_one_fails_all_of_the_request_end_and_others_go_on(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FURIOSA_BUILD_FAULT", "request:1_r@step=errno:EIO")
    engine.add_request("r", PROMPT, sampled(2))
    engine.add_request("other", [7], greedy(3))
    outputs: dict[str, RequestOutput] = {}
    failed: set[str] = set()
    while engine.has_unfinished_requests():
        try:
            got = engine.step()
        except StepFailedError as error:
            failed |= set(error.errors)
            got = error.outputs
        outputs |= {output.request_id: output for output in got}
        engine.check_integrity()
    assert "r" in failed
    assert failed <= {"r", "other"}  # those of one batch
    assert "other" in failed or outputs["other"].outputs[0].token_ids == toy.expected([7], 3)


def test_with_asyncio(toy_artifact: Path) -> None:
    async def generate() -> list[RequestOutput]:
        async with AsyncLLMEngine(lambda: LLMEngine(toy_artifact, seed=1)) as engine:
            return [output async for output in engine.generate(PROMPT, sampled(3, seed=5), "r")]

    *_, last = asyncio.run(generate())
    assert tokens_of(last) == tokens_of(LLM(toy_artifact).generate(PROMPT, sampled(3, seed=5))[0])
