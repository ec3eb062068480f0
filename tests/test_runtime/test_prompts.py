"""Prompts in every form that callers give them in, and what is none."""

from __future__ import annotations

import array
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.llm import LLM
from furiosa_build.runtime.prompts import WrongTypeError

from . import toy
from .stepping import drain, greedy

TEMPLATE = "{% for m in messages %}{{ m.content }}|{% endfor %}"

ONE: dict[str, Any] = {
    "text": "ab",
    "ids": [97, 98],
    "tuple": (97, 98),
    "range": range(97, 99),
    "array module": array.array("i", [97, 98]),
    "numpy": np.array([97, 98]),
    "numpy uint8": np.array([97, 98], dtype=np.uint8),
    "tensor": torch.tensor([97, 98]),
    "int32 tensor": torch.tensor([97, 98], dtype=torch.int32),
    "list of numpy ids": [np.int64(97), np.int32(98)],
    "list of scalar tensors": [torch.tensor(97), torch.tensor(98)],
    "dict of a text": {"prompt": "ab"},
    "dict of ids": {"prompt_token_ids": [97, 98]},
    "dict of numpy ids": {"prompt_token_ids": np.array([97, 98])},
    "dict of both": {"prompt": "ab", "prompt_token_ids": (97, 98)},
    "dict with null": {"prompt": "ab", "prompt_token_ids": None, "multi_modal_data": None},
    "another mapping": UserDict({"prompt": "ab"}),
}


@pytest.fixture
def llm(toy_artifact: Path) -> LLM:
    return LLM(toy_artifact, seed=1)


@pytest.mark.parametrize("name", ONE)
def test_one_prompt_in_each_form_alone_and_in_a_list(llm: LLM, name: str) -> None:
    expected = toy.expected(b"ab", 3)
    for prompts, number in ((ONE[name], 1), ([ONE[name]], 1), ((ONE[name], [97, 98], ONE[name]), 3)):
        outputs = llm.generate(prompts, greedy(3))
        assert [output.outputs[0].token_ids for output in outputs] == [expected] * number
    llm.engine.add_request("r", ONE[name], greedy(3))
    assert drain(llm.engine)["r"].outputs[0].token_ids == expected


@pytest.mark.parametrize(
    "prompts",
    [
        np.array([[97, 98], [99, 100]]),
        torch.tensor([[97, 98], [99, 100]]),
        [np.array([97, 98]), torch.tensor([99, 100])],
        np.array(["ab", "cd"]),
        [{"prompt": "ab"}, {"prompt_token_ids": [99, 100]}],
    ],
)
def test_several_prompts(llm: LLM, prompts: Any) -> None:
    outputs = llm.generate(prompts, greedy(2))
    assert [output.prompt_token_ids for output in outputs] == [[97, 98], [99, 100]]


def test_a_text_beside_its_tokens_is_shown(llm: LLM) -> None:
    [output] = llm.generate({"prompt": "shown", "prompt_token_ids": [97, 98]}, greedy(1))
    assert (output.prompt, output.prompt_token_ids) == ("shown", [97, 98])


NONE: dict[str, tuple[Any, str]] = {
    "None": (None, "None is not a prompt"),
    "bytes": (b"hi", "a value of type bytes is not a prompt"),
    "bytearray": (bytearray(b"hi"), "a value of type bytearray is not a prompt"),
    "a number": (5, "a value of type int is not a prompt"),
    "a set": ({1, 2}, "a value of type set is not a prompt"),
    "a generator": ((x for x in ["a"]), "a value of type generator is not a prompt"),
    "an object": (object(), "a value of type object is not a prompt"),
    "floats": ([1.0, 2.0], "1.0 is not a token id"),
    "numpy floats": (np.array([1.0]), r"an array of float64 \[1\] does not hold token ids"),
    "a tensor of floats": (torch.ones(2), r"an array of torch.float32 \[2\] does not hold token ids"),
    "a tensor of bools": (torch.tensor([True]), r"an array of torch.bool \[1\] does not hold token ids"),
    "a scalar tensor": (torch.tensor(1), r"an array of torch.int64 \[\] does not hold token ids"),
    "a cube": (np.ones((1, 1, 1), dtype=int), r"an array of int64 \[1, 1, 1\] does not hold token ids"),
    "bools": ([True, False], "True is not a token id"),
    "a text among ids": ([1, "a"], "'a' is not a token id"),
    "nested": ([[[1]]], r"\[1\] is not a token id"),
    "None in a list": (["a", None], "None is not a prompt"),
    "bytes in a list": (["a", b"b"], "a value of type bytes is not a prompt"),
    "an empty dict": ({}, "{} is not a prompt"),
    "a dict of bytes": ({"prompt": b"a"}, "{'prompt': b'a'} is not a prompt"),
    "a dict of floats": ({"prompt_token_ids": [0.5]}, "0.5 is not a token id"),
    "a dict of a text as ids": ({"prompt_token_ids": "ab"}, "a value of type str is not a prompt"),
}

WRONG: dict[str, tuple[Any, str]] = {
    "a lone surrogate": ("caf\udce9", r"the text is not valid Unicode: '\\udce9' at character 3"),
    "one in a dict": ({"prompt": "\ud800"}, "the text is not valid Unicode"),
    "an image": ({"prompt": "a", "multi_modal_data": {}}, "a prompt does not take `multi_modal_data`"),
    "a misspelt dict": ({"text": "a"}, "a prompt does not take `text`"),
    "a message alone": ({"role": "user", "content": "a"}, "a prompt does not take `content`"),
    "an empty text": ("", "the prompt is empty"),
    "an empty text in a list": (["a", ""], "the prompt is empty"),
    "no ids": ([[]], "the prompt is empty"),
    "a negative id": ([-1], "-1 is not a token id"),
    "an id beyond the vocabulary": (np.array([toy.VOCAB]), f"{toy.VOCAB} is not a token id"),
}


@pytest.mark.parametrize("name", NONE | WRONG)
def test_anything_else_is_refused_and_the_engine_goes_on(llm: LLM, name: str) -> None:
    prompt, message = (NONE | WRONG)[name]
    kind = WrongTypeError if name in NONE else UserError
    with pytest.raises(kind, match=f"^{message}"):
        llm.generate(prompt, greedy(1))
    assert issubclass(WrongTypeError, TypeError)
    assert not llm.engine.has_unfinished_requests()
    assert llm.generate("ab", greedy(2))[0].outputs[0].token_ids == toy.expected(b"ab", 2)


def test_others_go_on_when_a_request_is_refused(engine: LLMEngine) -> None:
    engine.add_request("a", "ab", greedy(4))
    engine.step()
    bad: Iterator[tuple[Any, ...]] = iter([("b", b"ab", greedy()), (7, "ab", greedy()), ("c", "ab", {"n": 1})])
    for arguments in bad:
        with pytest.raises(TypeError):
            engine.add_request(*arguments)
    assert drain(engine)["a"].outputs[0].token_ids == toy.expected(b"ab", 4)


def test_parameters_that_are_none(llm: LLM) -> None:
    for params in (5, {"temperature": 0}, [greedy(), None]):
        with pytest.raises(UserError, match=r"is not a SamplingParams|sampling parameters for"):
            llm.generate(["a", "b"], params)  # type: ignore[arg-type]


# Conversations


@pytest.fixture
def chats(toy_backend: toy.ToyBackend, tmp_path: Path) -> LLM:
    del toy_backend
    return LLM(toy.write_artifact(tmp_path / "chats", model_files={"chat_template.jinja": TEMPLATE}))


@pytest.mark.parametrize("content", ["ab", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]])
@pytest.mark.parametrize("several", [False, True])
def test_conversations(chats: LLM, content: Any, several: bool) -> None:
    conversation = [{"role": "user", "content": content}]
    for call in (chats.chat, chats.generate):
        outputs = call([conversation, conversation] if several else tuple(conversation), greedy(2))  # type: ignore[operator]
        assert [output.prompt_token_ids for output in outputs] == [list(b"ab|")] * (1 + several)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "None is not a conversation"),
        ("hi", "a value of type str is not a conversation"),
        (["hi"], "'hi' is not a message"),
        ([b"hi"], "a value of type bytes is not a conversation"),
        ([], "a conversation has no messages"),
        ([{"content": "hi"}], "{'content': 'hi'} is not a message"),
        ([{"role": "user", "content": "a"}, None], "None is not a message"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "{'type': 'image_url'} is not supported"),
        ([{"role": "user", "content": "caf\udce9"}], "the text is not valid Unicode"),
    ],
)
def test_what_is_no_conversation(chats: LLM, messages: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        chats.chat(messages, greedy(1))
    assert not chats.engine.has_unfinished_requests()
