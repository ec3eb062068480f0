from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.llm import LLM
from furiosa_build.runtime.sampling.params import SamplingParams

from . import toy

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
TEMPLATE = "{% for m in messages %}{{ m.content }}|{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture
def llm(toy_artifact: Path) -> LLM:
    return LLM(toy_artifact, seed=1)


@pytest.mark.parametrize(
    ("prompts", "as_tokens"),
    [
        ("abc", [b"abc"]),
        (["abc", "d"], [b"abc", b"d"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [2, 3]], [b"a", [2, 3]]),
        ((4, 5), [[4, 5]]),
        ([], []),
    ],
)
def test_kinds_of_prompts(llm: LLM, prompts: Any, as_tokens: list[Any]) -> None:
    outputs = llm.generate(prompts, GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == [toy.expected(p, 5) for p in as_tokens]
    assert all(output.finished for output in outputs)


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 1, 5)]
    outputs = llm.generate([[1], [2], [3]], params)
    assert [output.prompt_token_ids for output in outputs] == [[1], [2], [3]]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 1, 5]


def test_more_prompts_than_are_processed_at_once(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    del toy_backend
    llm = LLM(toy.write_artifact(tmp_path / "a", toy.artifact_data(max_processing_samples=2)))
    outputs = llm.generate([[n] for n in range(7)], GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == [toy.expected([n], 5) for n in range(7)]


def test_defaults(llm: LLM) -> None:
    assert 1 <= len(llm.generate([1])[0].outputs[0].token_ids) <= 16


def test_a_refused_prompt_leaves_nothing_running(llm: LLM) -> None:
    with pytest.raises(UserError, match="the prompt is empty"):
        llm.generate([[1], []], GREEDY)
    assert not llm.engine.has_unfinished_requests()
    llm.engine.check_integrity()
    assert llm.generate([1], GREEDY)[0].outputs[0].token_ids == toy.expected([1], 5)


def test_an_interruption_leaves_nothing_running(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2]], GREEDY)
    assert not llm.engine.has_unfinished_requests()


def test_one_sampling_parameters_per_prompt(llm: LLM) -> None:
    with pytest.raises(UserError, match="2 sampling parameters for 3 prompts"):
        llm.generate([[1], [2], [3]], [GREEDY, GREEDY])


def test_chat(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    del toy_backend
    llm = LLM(toy.write_artifact(tmp_path / "a", model_files={"chat_template.jinja": TEMPLATE}))
    one, two = [{"role": "user", "content": "hi"}], [{"role": "user", "content": "<bos>"}]
    [output] = llm.chat(one, GREEDY)
    assert output.prompt_token_ids == list(b"hi|>")
    outputs = llm.chat([one, two], GREEDY, add_generation_prompt=False)
    assert [output.prompt_token_ids for output in outputs] == [list(b"hi|"), [toy.BOS, *b"|"]]
    [output] = llm.generate(one, GREEDY)
    assert (output.prompt, output.prompt_token_ids) == ("hi|>", list(b"hi|>"))
    outputs = llm.generate([one, "a", two, [7]], GREEDY)
    assert [output.prompt_token_ids for output in outputs] == [list(b"hi|>"), [97], [toy.BOS, *b"|>"], [7]]


def test_chat_without_a_template(llm: LLM) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_prefix_caching_is_on_and_can_be_turned_off(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    del toy_backend
    data = toy.artifact_data({"prefill": [(1, 16)], "append": [(1, 4, 48)], "decode": [(4, 48)]}, block_size=4)
    artifact = toy.write_artifact(tmp_path / "a", data)
    for llm, expected in ((LLM(artifact), [0, 12]), (LLM(artifact, enable_prefix_caching=False), [0, 0])):
        cached = [llm.generate(list(range(15)), GREEDY)[0].num_cached_tokens for _ in range(2)]
        assert cached == expected
