"""The openai package: a conversation, a loop with tools, streams, parsed answers, and the same by its Responses API."""

from __future__ import annotations

import sys
from typing import Any, Literal

import openai
from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="unused", max_retries=0)
MODEL = client.models.list().data[0].id


class Sea(BaseModel):
    """The sea."""

    kind: Literal["calm", "wild"]


class Look(BaseModel):
    """Look at the sea."""

    at: Literal["shore", "sea"]


def chat_loop() -> None:
    messages: list[Any] = [{"role": "system", "content": "Speak."}]
    for words in ("Hello", "Go on", "And then?"):
        messages.append({"role": "user", "content": words})
        done = client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=4)
        messages.append(done.choices[0].message)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=messages,
            max_completion_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens <= 4


def tools_loop() -> None:
    messages: list[Any] = [{"role": "user", "content": "Look"}]
    tools = [openai.pydantic_function_tool(Look, name="look")]
    for _ in range(2):
        done = client.chat.completions.create(
            model=MODEL, messages=messages, tools=tools, tool_choice="required", parallel_tool_calls=False
        )
        message = done.choices[0].message
        messages.append(message)
        for call in message.tool_calls or []:
            look = Look.model_validate_json(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": f"nothing at the {look.at}"})
    assert len(messages) == 5
    parsed = client.chat.completions.parse(
        model=MODEL, messages=messages, tools=tools, tool_choice={"type": "function", "function": {"name": "look"}}
    )
    [call] = parsed.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Look)
    messages += [parsed.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "nothing"}]
    client.chat.completions.create(model=MODEL, messages=messages, tools=tools, max_tokens=2)


def parsed_answers() -> None:
    hello: list[Any] = [{"role": "user", "content": "Hello"}]
    parsed = client.chat.completions.parse(model=MODEL, messages=hello, response_format=Sea)
    assert isinstance(parsed.choices[0].message.parsed, Sea)
    again = [*hello, parsed.choices[0].message, *hello]
    client.chat.completions.create(model=MODEL, messages=again, max_tokens=2)
    with client.chat.completions.stream(model=MODEL, messages=hello, response_format=Sea) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Sea)


def responses() -> None:
    done = client.responses.create(model=MODEL, input="Hello", max_output_tokens=4)
    more = [{"role": "user", "content": "Hello"}, *done.output, {"role": "user", "content": "Go on"}]
    events = list(client.responses.create(model=MODEL, input=more, max_output_tokens=4, stream=True))
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert isinstance(client.responses.parse(model=MODEL, input="Hello", text_format=Sea).output_parsed, Sea)
    with client.responses.stream(model=MODEL, input="Hello", text_format=Sea) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Sea)
    tools = [openai.pydantic_function_tool(Look, name="look")["function"] | {"type": "function"}]
    called = client.responses.create(model=MODEL, input="Look", tools=tools, tool_choice="required")
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "nothing"}
        for item in called.output
        if item.type == "function_call"
    ]
    assert results
    given = [{"role": "user", "content": "Look"}, *called.output, *results]
    client.responses.create(model=MODEL, input=given, tools=tools, max_output_tokens=4)


def completions() -> None:
    done = client.completions.create(model=MODEL, prompt=["It was a", "The sea"], max_tokens=4, n=2, logprobs=2)
    assert len(done.choices) == 4
    scored = client.completions.create(model=MODEL, prompt="It was a", max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].logprobs is not None


for each in (chat_loop, tools_loop, parsed_answers, responses, completions):
    each()
    print(each.__name__)
