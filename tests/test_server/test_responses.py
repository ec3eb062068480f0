"""The Responses API, asked by OpenAI's own client. What is said is what a chat says."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from .process import Server

MODEL = "test"
HELLO = [{"role": "user", "content": "Hello"}]
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "add", "parameters": ADD, "strict": True}


class Sea(BaseModel):
    kind: Literal["calm", "wild"]
    tide: bool


def create(server: Server, **fields: Any) -> Any:
    return server.openai.responses.create(**{"model": MODEL, "input": "Hello", "temperature": 0, **fields})


def chat(server: Server, messages: list[Any], **fields: Any) -> Any:
    done = server.openai.chat.completions.create(model=MODEL, messages=messages, temperature=0, **fields)
    return done.choices[0].message.content


def test_a_text(running: Server) -> None:
    done = create(running, instructions="Speak.", max_output_tokens=6)
    said = chat(running, [{"role": "system", "content": "Speak."}, *HELLO], max_tokens=6)
    assert done.output_text == said
    assert (done.status, done.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (done.usage.output_tokens, done.usage.total_tokens) == (6, 6 + done.usage.input_tokens)
    assert (done.store, done.error, done.instructions) == (False, None, "Speak.")


def test_an_answer_is_input_of_the_next(running: Server) -> None:
    first = create(running, max_output_tokens=6)
    said = [*HELLO, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "Go on"}]
    expected = chat(running, said, max_tokens=4)
    more = {"role": "user", "content": [{"type": "input_text", "text": "Go on"}]}
    for items in (first.output, [item.model_dump() for item in first.output]):
        assert create(running, input=[*HELLO, *items, more], max_output_tokens=4).output_text == expected


def test_a_stream_tells_of_the_same_response(running: Server) -> None:
    events = list(create(running, max_output_tokens=6, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    expected = create(running, max_output_tokens=6)
    assert (
        "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected.output_text
    )
    last = events[-1].response
    assert (last.output_text, last.status, last.usage) == (expected.output_text, "incomplete", expected.usage)


def test_a_form_is_parsed(running: Server) -> None:
    fields: Any = {"model": MODEL, "input": "Hello", "text_format": Sea, "temperature": 0}
    parsed = running.openai.responses.parse(**fields)
    assert (parsed.status, type(parsed.output_parsed)) == ("completed", Sea)
    with running.openai.responses.stream(**fields) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed


def test_a_tool_is_called_and_its_result_taken(running: Server) -> None:
    one: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    done = create(running, **one)
    [call] = done.output
    assert (done.status, call.type, call.name) == ("completed", "function_call", "add")
    events = list(create(running, **one | {"tool_choice": {"type": "function", "name": "add"}}, stream=True))
    sent = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(sent) == events[-1].response.output[0].arguments
    assert len(sent) > 1
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
    said = create(running, input=[*HELLO, *done.output, result], tools=[TOOL], max_output_tokens=4).output_text
    function = {"name": "add", "arguments": call.arguments}
    turns = [
        *HELLO,
        {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "2"},
    ]
    tool = {"type": "function", "function": {"name": "add", "parameters": ADD, "strict": True}}
    assert said == chat(running, turns, tools=[tool], max_tokens=4)


def test_log_probabilities(running: Server) -> None:
    done = create(running, max_output_tokens=3, include=["message.output_text.logprobs"], top_logprobs=2)
    [part] = done.output[0].content
    assert [len(each.top_logprobs) for each in part.logprobs] == [2] * 3
    assert "".join(each.token for each in part.logprobs) == part.text
    assert create(running, max_output_tokens=3).output[0].content[0].logprobs == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"input": "word " * 2000}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[]"}]}, "input.0.arguments"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "y"}}}}, "text.format"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
    ],
)
def test_errors_name_the_field_as_it_was_sent(running: Server, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            create(running, stream=stream, **fields)
        assert refused.value.param == param


def test_what_changes_no_text_is_taken(running: Server) -> None:
    more = {
        "background": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "store": True,
        "truncation": "disabled",
    }
    done = create(running, max_output_tokens=3, **more, user="x", text={"verbosity": "medium"}, max_tool_calls=3)
    assert (done.output_text, done.metadata, done.store) == (
        create(running, max_output_tokens=3, reasoning=None, tools=None, text=None).output_text,
        {"a": "b"},
        False,
    )
