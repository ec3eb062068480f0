"""Conversations as clients send them, and the prompts that they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from furiosa_build.runtime.text.tokenizer import Tokenizer
from furiosa_build.server.openai import prompts
from furiosa_build.server.openai.messages import Message, TemplateOptions
from furiosa_build.server.openai.protocol import Function, Tool

from .asking import CHAT, HELLO, TEXT, post, prompt_of, said, text
from .process import Server

# Messages


def test_an_answers_message_can_be_sent_back(running: Server) -> None:
    create = running.openai.chat.completions.create
    first = create(**CHAT).choices[0].message
    tools = [Tool(type="function", function=Function(name="now")).model_dump(exclude_none=True)]
    call = create(**CHAT | {"max_tokens": 60}, tools=tools, tool_choice="required", parallel_tool_calls=False)
    called = call.choices[0].message
    assert called.tool_calls
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "2"}
    for after in ([first, HELLO[0]], [called, result]):
        given, *rest = after
        expected = create(**CHAT | {"messages": [*HELLO, given, *rest]}).choices[0].message.content  # type: ignore[list-item]
        for form in (given.model_dump(), given.model_dump(exclude_none=True)):  # type: ignore[union-attr]
            assert create(**CHAT | {"messages": [*HELLO, form, *rest]}).choices[0].message.content == expected


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}], "ab"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        (["a", {"type": "text", "text": "b"}, "c"], "abc"),
        ([], ""),
        ("", ""),
    ],
)
def test_content_in_parts(running: Server, content: object, shown: str) -> None:
    message = {"role": "assistant", "content": content}
    assert prompt_of(running, messages=[message]) == f"assistant: {shown}\nassistant:"


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "data:,x"}}, {"type": "input_audio"}])
def test_parts_that_are_no_text_are_refused(running: Server, part: dict[str, Any]) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}
    answer = post(running, "/v1/chat/completions", CHAT | {"messages": [message]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages.0.content.1"
    message = answer.json()["error"]["message"]
    assert message.startswith(f"messages.0.content.1: a part of type '{part['type']}' is not supported")


@pytest.mark.parametrize("arguments", ["", " ", "{}", None, {}, ...])
def test_empty_arguments_are_an_object(arguments: object) -> None:
    assert arguments_of(arguments) == {}


@pytest.mark.parametrize("arguments", ['{"a": [1]}', {"a": [1]}])
def test_arguments_reach_the_template_as_an_object(arguments: object) -> None:
    assert arguments_of(arguments) == {"a": [1]}


def arguments_of(arguments: object) -> object:
    function = {"name": "f"} | ({} if arguments is ... else {"arguments": arguments})
    call = {"id": "c", "type": "function", "function": function}
    turn = Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call]}).for_template()
    return turn["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize("arguments", ["null", "[1]", "42", '"x"', '{"a": 1', '{"a": NaN}', 42, [1]])
def test_other_arguments_are_refused(running: Server, arguments: object) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    answer = post(running, "/v1/chat/completions", CHAT | {"messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages.1.tool_calls.0.function.arguments"


# How messages become a prompt


def test_variables_of_the_template(running: Server) -> None:
    assert prompt_of(running, chat_template_kwargs={"style": "short"}) == "(short)user: Hello\nassistant:"
    assert prompt_of(running, add_generation_prompt=False) == "user: Hello\n"
    assert said(running, chat_template_kwargs={"style": "short"}) != said(running)
    for field in ("messages", "self"):
        answer = post(running, "/v1/chat/completions", CHAT | {"chat_template_kwargs": {field: 1}})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")


@pytest.mark.parametrize("last", ["It was a", " It was a ", "Hello"])
@pytest.mark.parametrize("template", ["{{ m.content }}", "{{ m.content | trim }}"])
def test_the_last_message_is_continued_as_by_transformers(
    chat_artifact: Path, tmp_path: Path, last: str, template: str
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((chat_artifact / "model" / name).read_bytes())
    whole = (
        "{% for m in messages %}<{{ m.role }}>"
        + template
        + "</>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(whole)
    messages = [*HELLO, {"role": "assistant", "content": last}]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )
    options = TemplateOptions(continue_final_message=True)
    turns = [Message.model_validate(message).for_template() for message in messages]
    ours = prompts.lay_out(Tokenizer(tmp_path), turns, options)
    assert ours == theirs


def test_a_long_prompt_is_cut(running: Server) -> None:
    with running.http as http:
        tokens = http.post("/tokenize", json={"prompt": "It was a long day, and the sea was calm."}).json()["tokens"]
    assert text(running, prompt=tokens, truncate_prompt_tokens=5) == text(running, prompt=tokens[-5:])
    assert text(running, prompt=tokens, truncate_prompt_tokens=5, truncation_side="right") == text(
        running, prompt=tokens[:5]
    )
    assert text(running, prompt=tokens, truncate_prompt_tokens=500) == text(running, prompt=tokens)
    assert text(running, prompt="word " * 2000, truncate_prompt_tokens=-1) != ""
    answer = post(running, "/v1/completions", TEXT | {"prompt": tokens, "truncate_prompt_tokens": 0})
    assert answer.json()["error"]["param"] == "prompt"
