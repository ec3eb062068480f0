"""Answers of OpenAI's Responses API: items, and the events of a stream in which they grow."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from furiosa_build.runtime.request import RequestOutput
from furiosa_build.server.openai.responses_request import ResponsesRequest
from furiosa_build.server.openai.tools import ParsedText

Json = dict[str, Any]


class OutputItems:
    """The items of an answer: a message where there is content, and calls. They grow, and none is taken back.

    Attributes:
        items: The items so far.
    """

    def __init__(self) -> None:
        self.items: list[Json] = []
        self._message: int | None = None
        self._calls: list[int] = []

    def grow(self, parsed: ParsedText, logprobs: Sequence[Json] = ()) -> list[Json]:
        """Takes the text so far, and the log probabilities of its new tokens. Gives the events of what is new."""
        events: list[Json] = []
        if parsed.content and self._message is None:
            events += self._open_message()
        if self._message is not None:
            events += self._grow_message(self._message, parsed.content, logprobs)
        for number, call in enumerate(parsed.calls):
            if number == len(self._calls):
                events += self._open_call(call.name)
            events += self._grow_call(self._calls[number], call.arguments)
        return events

    def close(self, status: str) -> list[Json]:
        """The events of the end. An answer that says nothing is an empty message."""
        events = [] if self.items else self._open_message()
        for index, item in enumerate(self.items):
            item["status"] = status
            place = {"item_id": item["id"], "output_index": index}
            if item["type"] == "function_call":
                done = {"name": item["name"], "arguments": item["arguments"]}
                events.append({"type": "response.function_call_arguments.done", **place, **done})
            else:
                [part] = item["content"]
                place |= {"content_index": 0}
                done = {"text": part["text"], "logprobs": part["logprobs"]}
                events.append({"type": "response.output_text.done", **place, **done})
                events.append({"type": "response.content_part.done", **place, "part": part})
            events.append({"type": "response.output_item.done", "output_index": index, "item": item})
        return events

    def _open_message(self) -> list[Json]:
        part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"id": _new_id("msg"), "type": "message", "role": "assistant", "status": "in_progress"}
        self._message, added = self._open({**item, "content": [part]}, {**item, "content": []})
        place = {"item_id": item["id"], "output_index": self._message, "content_index": 0}
        return [added, {"type": "response.content_part.added", **place, "part": {**part, "logprobs": []}}]

    def _grow_message(self, index: int, content: str, logprobs: Sequence[Json]) -> list[Json]:
        item = self.items[index]
        [part] = item["content"]
        delta = content[len(part["text"]) :]
        part["text"] = content
        part["logprobs"] += logprobs
        if not delta and not logprobs:
            return []
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        return [{"type": "response.output_text.delta", **place, "delta": delta, "logprobs": list(logprobs)}]

    def _open_call(self, name: str) -> list[Json]:
        call = {"id": _new_id("fc"), "type": "function_call", "call_id": _new_id("call"), "name": name}
        item = {**call, "arguments": "", "status": "in_progress"}
        index, added = self._open(item, dict(item))
        self._calls.append(index)
        return [added]

    def _grow_call(self, index: int, arguments: str) -> list[Json]:
        item = self.items[index]
        delta = arguments[len(item["arguments"]) :]
        item["arguments"] = arguments
        place = {"item_id": item["id"], "output_index": index}
        return [{"type": "response.function_call_arguments.delta", **place, "delta": delta}] if delta else []

    def _open(self, item: Json, shown: Json) -> tuple[int, Json]:
        index = len(self.items)
        self.items.append(item)
        return index, {"type": "response.output_item.added", "output_index": index, "item": shown}


class ResponseBody:
    """Writes the object of a response, which answers one request."""

    def __init__(self, body: ResponsesRequest) -> None:
        text = body.text.model_dump(by_alias=True, exclude_none=True)
        self._head: Json = {
            "id": f"resp_{body.request_id or uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "background": False,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": body.model,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": body.temperature,
            "text": text,
            "tool_choice": body.tool_choice or "auto",
            "tools": [{"parameters": None, "strict": None, **tool.model_dump()} for tool in body.tools],
            "top_logprobs": body.top_logprobs,
            "top_p": body.top_p,
            "truncation": "disabled",
        }

    def under_way(self) -> Json:
        """The response before anything is said."""
        return {**self._head, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}

    def finished(self, items: list[Json], state: RequestOutput) -> Json:
        """The whole response."""
        status = status_of(state)
        usage = {
            "input_tokens": len(state.prompt_token_ids),
            "input_tokens_details": {"cached_tokens": state.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": len(state.outputs[0].token_ids),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": len(state.prompt_token_ids) + len(state.outputs[0].token_ids),
        }
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        completed = int(time.time()) if status == "completed" else None
        ended = {"status": status, "completed_at": completed, "incomplete_details": details}
        return {**self._head, **ended, "output": items, "usage": usage}


def status_of(state: RequestOutput) -> str:
    """`completed`, or `incomplete` where tokens ran out."""
    return "incomplete" if state.outputs[0].finish_reason == "length" else "completed"


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
