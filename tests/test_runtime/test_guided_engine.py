"""Structured output in the engine, beside other requests."""

from __future__ import annotations

import asyncio
import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.async_engine import AsyncLLMEngine
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.engine_args import AsyncEngineArgs
from furiosa_build.runtime.request import Request, RequestOutput
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.scheduling.scheduler import Scheduler
from furiosa_build.runtime.text.tokenizer import Tokenizer

from . import toy
from .guides import END, QUICKSTART, VOCAB
from .stepping import drain


@pytest.fixture
def artifact(toy_backend: toy.ToyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy model with the quickstart model's tokenizer: its logits are noise."""
    del toy_backend
    monkeypatch.setattr(toy, "VOCAB", VOCAB)
    data = toy.artifact_data({"prefill": [(1, 8), (4, 8), (1, 128)], "decode": [(1, 128), (4, 128)]}, num_blocks=200)
    files = {
        "tokenizer.json": (QUICKSTART / "tokenizer.json").read_text(),
        "generation_config.json": {"eos_token_id": END},
    }
    return toy.write_artifact(tmp_path / "artifact", data, tokenizer=False, model_files=files)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "kind": {"enum": ["é", "☃☃", None, 1.5]},
        "scores": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 500}, "maxItems": 3},
        "inner": {"type": "object", "properties": {"x": {"type": "boolean"}}, "additionalProperties": False},
    },
    "required": ["name", "kind", "scores"],
    "additionalProperties": False,
}
SAMPLED = {
    "temperature": 1.3,
    "top_p": 0.9,
    "top_k": 50,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.5,
    "seed": 3,
}
# In this order they arrive, so the guided ones are preempted.
MIXED: dict[str, dict[str, Any]] = {
    "none": {"temperature": 0, "ignore_eos": True, "max_tokens": 40},
    "none sampled": {"ignore_eos": True, "max_tokens": 40, **SAMPLED},
    "json": {"guided_json": PERSON, "temperature": 0},
    "sampled json": {"guided_json": json.dumps(PERSON), **SAMPLED},
    "regex": {"guided_regex": r"[A-C]{9}-\d{4}", **SAMPLED},
    "choice": {"guided_choice": ["a", "ab", "abacus"], "temperature": 0},
    "grammar": {"guided_grammar": 'start: "(" ("x" | "yy" | "☃"){7} ")"', **SAMPLED},
}


def serve(artifact: Path, **arguments: Any) -> dict[str, RequestOutput]:
    """All of MIXED at once."""
    engine = LLMEngine(artifact, seed=1, **arguments)
    for name in MIXED:
        add(engine, name)
    return drain(engine)


def add(engine: LLMEngine, name: str) -> None:
    engine.add_request(name, prompt(name), SamplingParams(**{"max_tokens": 100, **MIXED[name]}))


def prompt(name: str) -> list[int]:
    return [list(MIXED).index(name) + 5] * 6


def check(outputs: dict[str, RequestOutput]) -> None:
    texts = {name: output.outputs[0].text for name, output in outputs.items()}
    for name in ("json", "sampled json"):
        jsonschema.validate(json.loads(texts[name]), PERSON)
    assert re.fullmatch(r"[A-C]{9}-\d{4}", texts["regex"])
    assert texts["choice"] in ("a", "ab", "abacus")
    assert re.fullmatch(r"\((x|yy|☃){7}\)", texts["grammar"])
    assert {output.outputs[0].finish_reason for name, output in outputs.items() if "none" not in name} == {"stop"}


def test_guided_requests_are_valid_and_disturb_no_others(artifact: Path) -> None:
    together = serve(artifact)
    check(together)
    assert together["none"].outputs[0].token_ids == toy.expected(prompt("none"), 40)
    for name in MIXED:
        engine = LLMEngine(artifact, seed=1)
        add(engine, name)
        assert drain(engine)[name] == together[name]


def test_preemption_changes_nothing(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preempted: list[str] = []
    preempt = Scheduler.preempt

    def spy(self: Scheduler, request: Request) -> None:
        if request.num_generated > 1:
            preempted.append(request.request_id)
        preempt(self, request)

    expected = serve(artifact)
    monkeypatch.setattr(Scheduler, "preempt", spy)
    assert serve(artifact, paged_attention_num_blocks=33) == expected
    assert any("none" not in name for name in preempted)


def test_neither_preemption_nor_hits_change_anything(
    toy_backend: toy.ToyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guided or not, greedy, sampled and beams: whenever they are preempted, and with prompts that begin alike."""
    del toy_backend
    monkeypatch.setattr(toy, "VOCAB", VOCAB)
    buckets: dict[str, list[tuple[int, ...]]] = {
        "prefill": [(1, 8), (2, 16)],
        "append": [(2, 4, 128)],
        "decode": [(2, 128), (6, 128)],
    }
    data = toy.artifact_data(buckets, num_blocks=300, beams=(2, 8))
    files = {
        "tokenizer.json": (QUICKSTART / "tokenizer.json").read_text(),
        "generation_config.json": {"eos_token_id": END},
    }
    artifact = toy.write_artifact(tmp_path / "artifact", data, tokenizer=False, model_files=files)
    requests = {
        **{name: ([7] * 13 + prompt(name), {"max_tokens": 30, **MIXED[name]}) for name in MIXED},
        **{f"beams {n}": ([7] * n, {"use_beam_search": True, "max_tokens": 8, "ignore_eos": True}) for n in (5, 14)},
    }

    def outputs(chance: random.Random | None, *, caches: bool, num_blocks: int) -> dict[str, RequestOutput]:
        engine = LLMEngine(artifact, seed=1, enable_prefix_caching=caches, paged_attention_num_blocks=num_blocks)
        [replica] = engine._replicas
        for name, (tokens, params) in requests.items():
            engine.add_request(name, tokens, SamplingParams(**params))
        found: dict[str, RequestOutput] = {}
        while engine.has_unfinished_requests():
            found |= {output.request_id: output for output in engine.step()}
            running = replica.scheduler.running
            if chance is not None and running and chance.random() < 0.03:
                replica.scheduler.preempt(chance.choice(running))
            engine.check_integrity()
        preemptions.append(engine.stats().preemptions)
        hits.append(engine.stats().cached_tokens)
        return found

    preemptions, hits = list[int](), list[int]()
    expected = outputs(None, caches=False, num_blocks=300)
    assert (preemptions, hits) == ([0], [0])
    for seed in range(3):
        for caches in (False, True):
            assert outputs(random.Random(seed), caches=caches, num_blocks=40) == expected
    assert min(preemptions[1:]) > 1
    assert min(hits[2::2]) > 0


def test_a_text_ends_where_its_grammar_does(artifact: Path, tokenizer: Tokenizer) -> None:
    engine = LLMEngine(artifact, seed=1)
    for number in range(30):  # without top_k and the like, so that the end, too, comes up
        engine.add_request(str(number), [5], SamplingParams(guided_choice=["a", "ab"], seed=number))
    ends = {(out.text, *out.token_ids[-1:]) for o in drain(engine).values() for out in o.outputs}
    [a], [b], [ab] = (tokenizer.encode(text) for text in ("a", "b", "ab"))
    assert {out for out in ends if out[0] == "a"} == {("a", END)}  # the model's own end
    assert {out for out in ends if out[0] == "ab"} <= {("ab", b), ("ab", ab)}  # no step for an end that must come
    assert len(ends) > 1
    assert a not in {out[1] for out in ends}


def test_only_max_tokens_cuts_a_text(artifact: Path) -> None:
    engine = LLMEngine(artifact, seed=1)
    engine.add_request("cut", [5], SamplingParams(guided_regex="a{200}", max_tokens=3))
    engine.add_request("whole", [5], SamplingParams(guided_regex="[ab]", max_tokens=1))
    outputs = drain(engine)
    assert outputs["cut"].outputs[0].finish_reason == "length"
    assert outputs["cut"].outputs[0].stop_reason is None
    assert re.fullmatch("a+", outputs["cut"].outputs[0].text)
    assert outputs["whole"].outputs[0].finish_reason == "stop"


def test_a_dead_end_of_a_grammar_ends_its_request_alone(artifact: Path) -> None:
    engine = LLMEngine(artifact, seed=1)
    engine.add_request("dead", [5], SamplingParams(guided_grammar='start: "ab" dead\ndead: /[^\\s\\S]/', max_tokens=50))
    engine.add_request("other", [5] * 3, SamplingParams(temperature=0, ignore_eos=True, max_tokens=9))
    outputs = drain(engine)
    [dead] = outputs["dead"].outputs
    assert (dead.text, dead.finish_reason, dead.stop_reason) == ("ab", "length", "no text can follow what there is")
    assert outputs["other"].outputs[0].token_ids == toy.expected([5] * 3, 9)


def test_log_probabilities_are_the_models_own(artifact: Path) -> None:
    engine = LLMEngine(artifact, seed=1)
    engine.add_request("r", [5, 6], SamplingParams(guided_regex=r"\d{4}", temperature=0, logprobs=1))
    [output] = drain(engine)["r"].outputs
    tokens = [5, 6]
    assert output.logprobs is not None
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        logits = toy.logits_after(tokens)
        assert entry[token].logprob == pytest.approx(float(logits.log_softmax(0)[token]), abs=1e-5)  # float32
        assert {id_ for id_ in entry if entry[id_].rank == 1} == {int(logits.argmax())}  # though it is not allowed
        tokens.append(token)


def test_a_refused_request_leaves_the_engine_as_it_was(artifact: Path) -> None:
    engine = LLMEngine(artifact, seed=1)
    with pytest.raises(UserError, match="Unimplemented"):
        engine.add_request("r", [5], SamplingParams(guided_json={"not": {}}))
    assert not engine.has_unfinished_requests()
    engine.check_integrity()


def test_an_engine_for_asyncio_prepares(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> str:
        async with AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model=str(artifact))) as engine:
            monkeypatch.setattr("llguidance.LLTokenizer", None)
            states = engine.generate("x", SamplingParams(guided_choice=["yes", "no"]), "1")
            return [state.outputs[0].text async for state in states][-1]

    assert asyncio.run(ask()) in ("yes", "no")
