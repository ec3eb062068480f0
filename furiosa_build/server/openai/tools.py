"""Tool calls: what makes a model write them, and how they are parsed.

With `tool_choice` "required" the text is a JSON list of `{"name", "arguments"}`, with a named function it is that
function's arguments; llguidance enforces both. With "auto" the model writes as it was trained to, and two ways of doing
so are known: `<tool_call>{"name", "arguments"}</tool_call>` of Hermes and Qwen anywhere in the text, and
`{"name", "parameters"}` of Llama 3 as all of it.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.server.http.errors import bad_request
from furiosa_build.server.openai.protocol import ChatRequest, Function

Json = dict[str, Any]

MAX_CALLS = 16
"""Most calls in a text that must be calls: some models go on until the context is full."""

OPEN, CLOSE = "<tool_call>", "</tool_call>"

# The form that llguidance allows a list of calls: see `_JSON` in runtime/sampling/guided.py.
_HEAD = re.compile(r'[\[,] ?\{"name": ?"([^"]*)", ?"arguments": ?(?=\{)')
# Numbers stay texts, as Python refuses long ones. It is quick enough to read the arguments so far again at every token.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, strict=False)


@dataclass(frozen=True)
class Call:
    """A call of a function. `arguments` is JSON text; while the text grows, its beginning."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ParsedText:
    """A text as content for a person, and calls. As the text grows, both are only appended to."""

    content: str
    calls: list[Call] = field(default_factory=list)


Parser = Callable[[str, bool], ParsedText]
"""Parses a text so far; with True, a finished one."""


@dataclass(frozen=True)
class ToolUse:
    """The use of tools that a request asks for.

    Attributes:
        offered: The tools for the chat template; None: it gets none.
        schema: The schema of the text; None: it is free.
        parse: Parses the text.
        has_special_tags: The tags around calls are special tokens, which the text has to show.
    """

    offered: list[Json] | None
    schema: Json | None
    parse: Parser
    has_special_tags: bool = False

    def shown(self, params: list[SamplingParams]) -> list[SamplingParams]:
        """The parameters of texts that show what `parse` looks for."""
        return [replace(each, skip_special_tokens=False) for each in params] if self.has_special_tags else params


def tool_use(body: ChatRequest, special_tokens: Collection[str] = ()) -> ToolUse:
    """The use of tools that a request asks for, of a tokenizer with these special tokens.

    Raises ApiError where tools, choice and response format conflict.
    """
    functions = _functions(body)
    choice = _choice(body, functions)
    if choice == "none":
        return ToolUse(None, None, _content)
    if body.response_format is not None and body.response_format.get("type") != "text":
        message = "with a response_format no tool could be called: give no tools, or tool_choice 'none'"
        raise bad_request(message, "response_format")
    offered = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    most = 1 if body.parallel_tool_calls is False else None
    if choice == "auto":
        tagged = body.skip_special_tokens and not {OPEN, CLOSE}.isdisjoint(special_tokens)
        hidden = frozenset(special_tokens) - {OPEN, CLOSE} if tagged else frozenset()

        def parse(text: str, finished: bool) -> ParsedText:
            return _parse_free_text(_without(text, hidden), finished, functions, most)

        return ToolUse(offered, None, parse, tagged)
    if choice == "required":
        return ToolUse(offered, _list_schema(functions, most or MAX_CALLS), lambda text, _: _parse_list(text))
    name = choice.removeprefix("function ")
    return ToolUse(offered, _arguments_schema(functions[name]), lambda text, _: ParsedText("", [Call(name, text)]))


def _functions(body: ChatRequest) -> dict[str, Function]:
    functions = {tool.function.name: tool.function for tool in body.tools or []}
    if len(functions) < len(body.tools or []):
        raise bad_request("several tools have the same name", "tools")
    for name, function in functions.items():
        if (function.parameters or {}).get("type", "object") != "object":
            raise bad_request(f"the parameters of {name!r} are not the schema of an object", "tools")
    return functions


def _choice(body: ChatRequest, functions: Collection[str]) -> str:
    """`none`, `auto`, `required`, or `function NAME`."""
    match body.tool_choice:
        case None | "none" | "auto" as choice:
            return "none" if not functions else choice or "auto"
        case "required" if functions:
            return "required"
        case {"function": {"name": str(name)}} as named if name in functions and named == _named(name):
            return f"function {name}"
    valid = (
        "'none', 'auto', and if there are tools 'required' or {'type': 'function', 'function': {'name': one of them}}"
    )
    raise bad_request(f"tool_choice does not take {body.tool_choice!r}, only {valid}", "tool_choice")


def _named(name: str) -> Json:
    return {"type": "function", "function": {"name": name}}


# Schemas


def _arguments_schema(function: Function) -> Json:
    if function.parameters is None:  # which says that there are none
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {**function.parameters, "type": "object"}


def _list_schema(functions: dict[str, Function], most: int) -> Json:
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                # An id of its own, so that its references are to its own definitions.
                "arguments": {"$id": f"urn:tool:{number}", **_arguments_schema(function)},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, (name, function) in enumerate(functions.items())
    ]
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": most}


# Parsing


def _content(text: str, finished: bool) -> ParsedText:
    del finished
    return ParsedText(text)


def _parse_list(text: str) -> ParsedText:
    """The calls of a list that llguidance has enforced. The last may be incomplete."""
    calls, position = [], 0
    while head := _HEAD.match(text, position):
        end = _object_end(text, head.end())
        calls.append(Call(head[1], text[head.end() : end]))
        if end is None:
            break
        position = end + len("}")
    return ParsedText("", calls)


def _object_end(text: str, start: int) -> int | None:
    """The end of the JSON object that begins at `start` ends; None if it is incomplete or nested too deeply."""
    try:
        return _DECODER.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


def _without(text: str, tokens: frozenset[str]) -> str:
    """A text without the special tokens that nobody should see."""
    return _any_of(tokens).sub("", text) if tokens else text


@lru_cache(maxsize=8)
def _any_of(tokens: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _parse_free_text(text: str, finished: bool, names: Collection[str], most: int | None) -> ParsedText:
    """The calls in free text. What is not a call is content, as soon as that is certain."""
    if text.lstrip().startswith("{"):
        if not finished:
            return ParsedText("")
        whole = _call(text, names)
        return ParsedText(text) if whole is None else ParsedText("", [whole])
    content, calls, position = "", [], 0
    while (begin := text.find(OPEN, position)) >= 0:
        content += text[position:begin]
        end = text.find(CLOSE, begin)
        if end < 0 and not finished:
            position = len(text)
            break
        call = _call(text[begin + len(OPEN) : end if end >= 0 else len(text)], names)
        position = end + len(CLOSE) if end >= 0 else len(text)
        if call is None:
            content += text[begin:position]
        else:
            calls.append(call)
    rest = text[position:]
    content += rest if finished else rest[: len(rest) - _partial_open_length(rest)]
    if calls or not finished:  # white space before and between calls says nothing
        content = content.rstrip()
    return ParsedText(content, calls[:most])


def _partial_open_length(text: str) -> int:
    """The number of last characters that may be the beginning of OPEN."""
    return next((size for size in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:size])), 0)


def _call(text: str, names: Collection[str]) -> Call | None:
    """The call that a JSON text is; None if it is not one, or names an unknown function."""
    try:
        value = json.loads(text, strict=False)
        if not isinstance(value, dict) or value.get("name") not in names:
            return None
        arguments = value.get("arguments", value.get("parameters"))
        return Call(value["name"], json.dumps(arguments, allow_nan=False)) if isinstance(arguments, dict) else None
    except (TypeError, ValueError, RecursionError):  # TypeError: the name is a list
        return None


# Responses


def message(parsed: ParsedText) -> Json:
    """The message of a response."""
    if not parsed.calls:
        return {"role": "assistant", "content": parsed.content, "refusal": None}
    calls = [{"id": _new_id(), "type": "function", "function": vars(call)} for call in parsed.calls]
    return {"role": "assistant", "content": parsed.content or None, "refusal": None, "tool_calls": calls}


class MessageDeltas:
    """Follows one message and gives what is new of it."""

    def __init__(self) -> None:
        self._sent: ParsedText | None = None

    def next(self, parsed: ParsedText) -> Json:
        """The next `delta`."""
        before = ParsedText("") if self._sent is None else self._sent
        delta: Json = {} if self._sent else {"role": "assistant"}
        self._sent = parsed
        if not parsed.calls or len(parsed.content) > len(before.content):
            delta["content"] = parsed.content[len(before.content) :]
        calls = []
        for index, call in enumerate(parsed.calls):
            if index >= len(before.calls):
                calls.append({"index": index, "id": _new_id(), "type": "function", "function": vars(call)})
            elif more := call.arguments[len(before.calls[index].arguments) :]:
                calls.append({"index": index, "function": {"arguments": more}})
        return {**delta, "tool_calls": calls} if calls else delta


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
