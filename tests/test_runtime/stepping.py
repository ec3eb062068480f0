"""How tests drive an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.request import RequestOutput
from furiosa_build.runtime.sampling.params import SamplingParams


def greedy(max_tokens: int = 12, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **{"ignore_eos": True, **others})


def drain(engine: LLMEngine) -> dict[str, RequestOutput]:
    """Steps to the end; checks the state, and that outputs only grow. Returns the last output of each request."""
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            check_grows(last.get(output.request_id), output)
            last[output.request_id] = output
        engine.check_integrity()
    assert engine.step() == []
    assert all(output.finished for output in last.values())
    return last


def check_grows(before: RequestOutput | None, after: RequestOutput) -> None:
    if before is not None:
        assert not before.finished
        assert after.outputs[0].text.startswith(before.outputs[0].text)
        assert after.outputs[0].token_ids[:-1] == before.outputs[0].token_ids


def run(engine: LLMEngine, prompt: str | Sequence[int], params: SamplingParams) -> RequestOutput:
    engine.add_request("r", prompt, params)
    return drain(engine)["r"]


def tokens_of(outputs: dict[str, RequestOutput]) -> list[list[int]]:
    return [outputs[name].outputs[0].token_ids for name in sorted(outputs)]
