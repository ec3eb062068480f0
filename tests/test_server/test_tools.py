"""Calls of tools: found in texts as models write them, and constrained as OpenAI's client asks for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

import httpx
import jsonschema
import openai
import pytest

from furiosa_build.artifact.reader import open_artifact
from furiosa_build.runtime.async_engine import AsyncLLMEngine
from furiosa_build.runtime.request import CompletionOutput, FinishReason, RequestOutput
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.text.tokenizer import Tokenizer
from furiosa_build.server.app import create_app
from furiosa_build.server.openai import tools
from furiosa_build.server.openai.protocol import ChatRequest
from furiosa_build.server.openai.tools import Call, MessageDeltas, ParsedText
from furiosa_build.server.options import ServerOptions
from furiosa_build.server.service import Service

from .process import Server

MODEL = "test"
HELLO = [{"role": "user", "content": "Hello"}]

WEATHER = {
    "type": "object",
    "properties": {"place": {"$ref": "#/$defs/Place"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["place", "days"],
    "additionalProperties": False,
    "$defs": {"Place": {"enum": ["sea", "shore"]}},  # as pydantic writes them
}
TIDE = {
    "type": "object",
    "properties": {"high": {"type": "boolean"}, "at": {"$ref": "#/$defs/Place"}},
    "required": ["high", "at"],
    "additionalProperties": False,
    "$defs": {"Place": {"enum": ["harbour"]}},  # another of the same name
}
SCHEMAS = {"weather": WEATHER, "tide": TIDE, "now": None}


def tool(name: str, parameters: object = None) -> dict[str, Any]:
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [tool(name, schema) for name, schema in SCHEMAS.items()]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


# What a model writes of its own accord


def auto(**fields: object) -> tools.Parser:
    body = {"model": MODEL, "messages": HELLO, "tools": TOOLS, **fields}
    return tools.tool_use(ChatRequest.model_validate(body)).parse


def hermes(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


NOW = Call("now", "{}")
SEA = Call("weather", '{"place": "sea"}')

WRITTEN = [
    ("Hello <b> you.\n", ParsedText("Hello <b> you.\n")),
    (hermes("now"), ParsedText("", [NOW])),
    (f"Let me look.\n\n{hermes('now')}\n{hermes('weather', place='sea')}\n", ParsedText("Let me look.", [NOW, SEA])),
    (f"{hermes('now')} That is all.", ParsedText(" That is all.", [NOW])),
    (hermes("now").removesuffix("</tool_call>"), ParsedText("", [NOW])),  # a stop token stood for the end
    ('{"name": "weather", "parameters": {"place": "sea"}}', ParsedText("", [SEA])),  # Llama 3
    (' {"name": "now", "arguments": {}}\n', ParsedText("", [NOW])),
]
NO_CALLS = [
    hermes("tomorrow"),
    hermes("now")[:-20],
    "<tool_call>[1]</tool_call>",
    '<tool_call>{"name": ["now"], "arguments": {}}</tool_call>',
    '<tool_call>{"name": "now", "arguments": {"x": NaN}}</tool_call>',
    '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>',
    '<tool_call>{"name": "now"}</tool_call>',
    "<tool_call>" + "[" * 5000 + "</tool_call>",
    '{"name": "now", "parameters": {}} and more',
    '{"answer": 42}',
    "<tool_ca",
    "",
]


@pytest.mark.parametrize(("text", "parsed"), [*WRITTEN, *((text, ParsedText(text)) for text in NO_CALLS)])
def test_calls_in_a_models_own_words(text: str, parsed: ParsedText) -> None:
    assert auto()(text, True) == parsed


@pytest.mark.parametrize("text", [*(text for text, _ in WRITTEN), *(text for text in NO_CALLS if len(text) < 500)])
def test_a_stream_of_them_adds_up(text: str) -> None:
    """However a text is cut: what was sent is never taken back, and adds up to the message."""
    read, deltas = auto(), MessageDeltas()
    sent = [deltas.next(read(text[:end], False)) for end in range(len(text))]
    sent.append(deltas.next(read(text, True)))
    assert added_up(sent) == [read(text, True).content, *read(text, True).calls]
    assert [delta.get("role") for delta in sent] == ["assistant"] + [None] * (len(sent) - 1)


def added_up(deltas: list[dict[str, Any]]) -> list[str | Call]:
    """As a client does it: content, then calls."""
    content, names, arguments = "", [], []
    for delta in deltas:
        content += delta.get("content") or ""
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(names)
                names.append(call["function"]["name"])
                arguments.append("")
            arguments[call["index"]] += call["function"]["arguments"]
    return [content, *map(Call, names, arguments)]


def test_text_is_sent_as_soon_as_it_is_no_call() -> None:
    read = auto()
    assert read("It is <too", False) == ParsedText("It is")
    assert read("It is <too late", False) == ParsedText("It is <too late")


def test_calls_beyond_the_first_are_left_out_if_so_asked() -> None:
    text = hermes("now") * 2
    assert auto()(text, True).calls == [NOW, NOW]
    assert auto(parallel_tool_calls=False)(text, True) == ParsedText("", [NOW])


def test_a_list_of_calls_grows() -> None:
    read = auto(tool_choice="required")
    nested = '{"place": "a \\"}\\\\", "x": [{"y": {}}, "]"]}'
    text = f'[{{"name": "weather", "arguments": {nested}}}, {{"name":"now","arguments":{{}}}}]'
    deltas = MessageDeltas()
    sent = [deltas.next(read(text[:end], False)) for end in range(len(text) + 1)]
    assert added_up(sent) == ["", Call("weather", nested), NOW]


class Speaking:
    """In place of an engine: one that says `text`, a character a step."""

    is_dead = False

    def __init__(self, text: str, artifact: Path) -> None:
        self.text = text
        self.artifact = open_artifact(artifact).artifact
        self.tokenizer = Tokenizer(artifact / "model")

    async def generate(self, prompt: list[int], _: object, request_id: str) -> AsyncGenerator[RequestOutput, None]:
        for end in range(1, len(self.text) + 1):
            reason: FinishReason | None = "stop" if end == len(self.text) else None
            output = CompletionOutput(0, self.text[:end], list(range(end)), None, None, reason, None)
            yield RequestOutput(request_id, None, prompt, [output], reason is not None, None)


def test_calls_of_its_own_accord_are_answered_as_calls(chat_artifact: Path) -> None:
    async def ask(stream: bool) -> Any:
        service = Service(ServerOptions())
        service.start(cast(AsyncLLMEngine, Speaking(f"Let me look.\n{hermes('weather', place='sea')}", chat_artifact)))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service))) as http:
            client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="unused", http_client=http)
            create: Any = client.chat.completions.create
            answer = await create(model=MODEL, messages=HELLO, tools=TOOLS, stream=stream)
            return [chunk.choices[0] async for chunk in answer] if stream else answer.choices[0]

    choice = asyncio.run(ask(stream=False))
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
    assert [call.function.model_dump() for call in choice.message.tool_calls] == [vars(SEA)]
    chunks = asyncio.run(ask(stream=True))
    assert added_up([chunk.delta.model_dump(exclude_unset=True) for chunk in chunks]) == ["Let me look.", SEA]
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]


# What a model is made to write, asked for by OpenAI's own client


def ask(server: Server, **fields: Any) -> Any:
    body: dict[str, Any] = {"messages": HELLO, "tools": TOOLS, "max_tokens": 200, "temperature": 1, "seed": 3}
    return server.openai.chat.completions.create(model=MODEL, **{**body, **fields})


def check(name: str, arguments: str) -> None:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    jsonschema.validate(json.loads(arguments), SCHEMAS[name] or nothing)


@pytest.mark.parametrize("seed", range(4))
def test_required_calls_one_of_the_tools(running: Server, seed: int) -> None:
    choice = ask(running, tool_choice="required", parallel_tool_calls=False, seed=seed).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    check(call.function.name, call.function.arguments)


def test_required_calls_several_but_not_for_ever(running: Server) -> None:
    """This model would go on as long as it may."""
    choice = ask(running, tool_choice="required", tools=TOOLS[2:], max_tokens=600).choices[0]
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls
    assert 1 < len({call.id for call in calls}) == len(calls) <= tools.MAX_CALLS
    for call in calls:
        check(call.function.name, call.function.arguments)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_function_is_called(running: Server, name: str) -> None:
    choice = ask(running, tool_choice=named(name)).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls
    assert call.function.name == name
    check(name, call.function.arguments)


@pytest.mark.parametrize("choice", ["required", named("weather")])
def test_a_stream_has_the_same_calls(running: Server, choice: object) -> None:
    fields = {"tool_choice": choice, "parallel_tool_calls": False}
    expected = [each.function for each in ask(running, **fields).choices[0].message.tool_calls]
    chunks = [chunk.choices[0] for chunk in ask(running, stream=True, **fields)]
    sent = [chunk.delta.model_dump(exclude_unset=True) for chunk in chunks]
    assert added_up(sent) == ["", *(Call(each.name, each.arguments) for each in expected)]
    assert sum("tool_calls" in delta for delta in sent) > 1  # the arguments come bit by bit
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]


def test_a_call_that_is_cut_says_so(running: Server) -> None:
    choice = ask(running, tool_choice=named("weather"), max_tokens=2).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments.startswith('{"')


def test_auto_leaves_a_text_that_calls_nothing_as_it_is(running: Server) -> None:
    choice = ask(running, max_tokens=4).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert choice.message.content


def test_a_conversation_goes_on_after_a_call(running: Server) -> None:
    call = ask(running, tool_choice=named("tide")).choices[0].message
    answer = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "high"}
    done = ask(running, messages=[*HELLO, call.model_dump(exclude_none=True), answer], max_tokens=4)
    assert done.choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tool_choice": "required", "tools": None}, "tool_choice", "only 'none', 'auto'"),
        ({"tool_choice": "any"}, "tool_choice", "'any'"),
        ({"tool_choice": named("tomorrow")}, "tool_choice", "tomorrow"),
        ({"tool_choice": {"type": "function", "function": {"name": ["now"]}}}, "tool_choice", "one of them"),
        ({"tools": [tool("x"), tool("x")]}, "tools", "same name"),
        ({"tools": [tool("x y")]}, "tools.0.function.name", "pattern"),
        ({"tools": [tool("x", {"type": "string"})]}, "tools", "not the schema of an object"),
        ({"tools": [tool("x", {"properties": {"y": {"type": "z"}}})], "tool_choice": named("x")}, "tools", "served"),
        ({"tools": [tool("x", {"properties": {"y": {"$ref": "#/z"}}})], "tool_choice": "required"}, "tools", "served"),
        ({"response_format": {"type": "json_object"}}, "response_format", "no tool could be called"),
        ({"tool_choice": "required", "stop": "x"}, "stop", "where the text ends"),
    ],
)
def test_what_cannot_be_is_refused_before_generation(
    running: Server, fields: dict[str, Any], param: str, words: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(running, stream=stream, **fields)
        assert refused.value.param == param
        assert words in str(refused.value)


SPECIAL = ("<|im_end|>", "<tool_call>", "</tool_call>")


def test_tags_that_are_special_tokens_are_shown_and_others_are_not() -> None:
    body = ChatRequest.model_validate({"model": MODEL, "messages": HELLO, "tools": TOOLS})
    use = tools.tool_use(body, SPECIAL)
    text = 'See.<|im_end|><tool_call>{"name": "now", "arguments": {}}</tool_call><|im_end|>'
    assert use.parse(text, True) == ParsedText("See.", [Call("now", "{}")])
    [params] = use.shown([SamplingParams()])
    assert not params.skip_special_tokens


@pytest.mark.parametrize("further", [{"tools": None}, {"tool_choice": "required"}, {"skip_special_tokens": False}])
def test_special_tokens_stay_as_the_request_wants_them(further: dict[str, Any]) -> None:
    body = ChatRequest.model_validate({"model": MODEL, "messages": HELLO, "tools": TOOLS} | further)
    use = tools.tool_use(body, SPECIAL)
    assert use.shown([SamplingParams()]) == [SamplingParams()]
    if further == {"skip_special_tokens": False}:
        assert use.parse("a<|im_end|>", True).content == "a<|im_end|>"
