"""Conversations: the messages of a request, and how the chat template gets them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import jiter
from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from furiosa_build.server.http.body import Body, Unsupported
from furiosa_build.server.http.errors import bad_request

_NOT_TEXT = "the model reads text only"

_OF_THE_REQUEST = {"self", "messages", "tools"}
"""What a chat template has of other fields of the request."""


class ContentPart(Body):
    """A part of a message's content. There are texts only; a refusal is one."""

    without_effect: ClassVar = frozenset({"annotations", "cache_control", "logprobs", "prompt_cache_breakpoint"})
    type: str = Field(description="text, input_text, output_text or refusal.")
    text: str = ""
    refusal: str = ""

    @model_validator(mode="after")
    def _is_text(self) -> Self:
        field = "refusal" if self.type == "refusal" else "text"
        context = {"type": self.type, "field": field, "why": _NOT_TEXT}
        if self.type not in ("text", "input_text", "output_text", "refusal"):
            raise PydanticCustomError("unsupported", "a part of type '{type}' is not supported: {why}", context)
        if field not in self.model_fields_set:
            raise PydanticCustomError("no_text", "a part of type '{type}' needs '{field}'", context)
        return self

    @property
    def as_text(self) -> str:
        """What the part says."""
        return self.refusal if self.type == "refusal" else self.text


Content = str | list[str | ContentPart]
"""What a message says: a text, or parts of it."""


class CalledFunction(Body):
    """The function of a call, and its arguments: OpenAI sends them as text, templates write them as JSON."""

    without_effect: ClassVar = frozenset({"parsed_arguments"})
    name: str
    arguments: str | dict[str, Any] = Field({}, description="A JSON object, or one as text; empty: no arguments.")

    @field_validator("arguments")
    @classmethod
    def _object(cls, given: str | dict[str, Any]) -> dict[str, Any]:
        if isinstance(given, dict):
            return given
        try:
            arguments = jiter.from_json(given.encode(), allow_inf_nan=False) if given.strip() else {}
        except ValueError as error:  # UnicodeEncodeError is one
            raise PydanticCustomError("json_invalid", "invalid JSON: {error}", {"error": str(error)}) from error
        if not isinstance(arguments, dict):
            raise PydanticCustomError("dict_type", "the arguments of a call are a JSON object")
        return arguments


class ToolCall(Body):
    """A call of a function, in the history."""

    without_effect: ClassVar = frozenset({"index"})
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """A turn of a conversation."""

    without_effect: ClassVar = frozenset({"annotations", "parsed"})
    unsupported: ClassVar = {
        "audio": Unsupported(_NOT_TEXT),
        "function_call": Unsupported("give tool_calls"),
    }
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message for a chat template: the content is one text, absent fields are left out."""
        given = self.model_dump(exclude_none=True, exclude={"refusal"})
        given["content"] = self.text
        if not self.tool_calls:
            given.pop("tool_calls", None)
        thoughts = self.reasoning_content or self.reasoning
        return given | ({"reasoning_content": thoughts, "reasoning": thoughts} if thoughts else {})

    @property
    def text(self) -> str:
        """What the message says."""
        if isinstance(self.content, list):
            return "".join(part if isinstance(part, str) else part.as_text for part in self.content)
        return self.content or self.refusal or ""


class TemplateOptions(Body):
    """The fields of a request that say how messages become a prompt. All are vLLM's additions."""

    add_generation_prompt: bool | None = Field(
        None, description="Whether the prompt ends with the head of an answer: by default, if no message is continued."
    )
    continue_final_message: bool = Field(False, description="Whether the answer goes on where the last message ends.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="Further variables of the chat template.")
    documents: list[dict[str, Any]] | None = Field(None, description="A variable of the chat template.")
    reasoning_effort: str | None = Field(None, description="A variable of the chat template.")

    @field_validator("chat_template_kwargs")
    @classmethod
    def _further(cls, given: dict[str, Any]) -> dict[str, Any]:
        if own := sorted(_OF_THE_REQUEST & given.keys()):
            raise PydanticCustomError("reserved", "the request itself gives {names}", {"names": ", ".join(own)})
        return given

    def template_variables(self) -> dict[str, Any]:
        """The variables of the chat template, apart from messages and tools. Raises ApiError where they conflict."""
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt do not go together"
            raise bad_request(message, "add_generation_prompt")
        given = {
            "add_generation_prompt": self.add_generation_prompt,
            "documents": self.documents,
            "reasoning_effort": self.reasoning_effort,
        }
        variables = {"add_generation_prompt": not self.continue_final_message, **self.chat_template_kwargs}
        variables |= {name: value for name, value in given.items() if value is not None}
        if self.reasoning_effort is not None:
            variables.setdefault("enable_thinking", self.reasoning_effort != "none")
        return variables
