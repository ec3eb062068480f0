"""Requests of OpenAI's API, as far as they have an effect here. Unknown fields are refused, not ignored."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from furiosa_build.runtime.sampling.guided import from_response_format
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.server.http.errors import bad_request

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_TOOLS = 128

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Body(BaseModel):
    """Base of all requests."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """`include_usage`: a last chunk with the numbers of tokens."""

    include_usage: bool = False


class Sampling(Body):
    """The fields that completions and chats have in common. Fields from `top_k` on are vLLM's additions."""

    model: str
    n: int = Field(1, ge=1, le=MAX_N)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, max_length=1024)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted and ignored.")
    response_format: dict[str, Any] | None = None

    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: list[int] | None = Field(None, max_length=1024)
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def params(
        self, max_tokens: int | None, logprobs: int | None, schema: dict[str, Any] | None = None
    ) -> list[SamplingParams]:
        """Sampling parameters of each of the `n` texts, which `schema` constrains. Raises ApiError and UserError."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is for streams only: give stream=true", "stream_options")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS:
            raise bad_request(f"{len(stops)} stop strings; at most {MAX_STOPS} are accepted", "stop")
        optional = (
            "temperature",
            "top_p",
            "frequency_penalty",
            "presence_penalty",
            "top_k",
            "min_p",
            "repetition_penalty",
            "min_tokens",
        )
        given = {name: value for name in optional if (value := getattr(self, name)) is not None}
        if schema is not None:
            given["guided_json"] = schema
        elif self.response_format is not None:
            given |= from_response_format(self.response_format)
        return [
            SamplingParams(
                max_tokens=max_tokens,
                logprobs=logprobs,
                stop=stops,
                stop_token_ids=self.stop_token_ids or [],
                ignore_eos=self.ignore_eos,
                skip_special_tokens=self.skip_special_tokens,
                logit_bias=self._logit_bias(),
                seed=self.seed if self.seed is None else _derived(self.seed, index),
                **given,
            )
            for index in range(self.n)
        ]

    def _logit_bias(self) -> dict[int, float]:
        bias = self.logit_bias or {}
        for token in bias:
            if not (token.isascii() and token.isdecimal() and len(token) < 10):
                raise bad_request(f"logit_bias: {token!r} is not a token id", "logit_bias")
        return {int(token): value for token, value in bias.items()}


def _derived(seed: int, index: int) -> int:
    """The seed of one of n texts; that of the first is the request's own."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "little") >> 1


class CompletionRequest(Sampling):
    """Body of /v1/completions."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | TokenIds
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_N)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_N)]
    )
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TextPart(Body):
    """A part of a message's content. There are texts only."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message for a chat template: the content is one text, absent fields are left out."""
        content = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content
        given = self.model_dump(exclude_none=True) | {"content": content or ""}
        if self.tool_calls is not None:
            given["tool_calls"] = [_with_parsed_arguments(call) for call in self.tool_calls]
        return given


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object: OpenAI sends them as text, templates write them as JSON."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return call | {"function": function | {"arguments": json.loads(function["arguments"])}}
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the arguments of a tool call are invalid JSON: {error}", "messages") from error


class Function(Body):
    """A function that can be called. `strict` changes nothing: constrained calls always follow the schema."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that is offered to the model."""

    type: Literal["function"]
    function: Function


class ChatRequest(Sampling):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def chat_params(self, schema: dict[str, Any] | None = None) -> list[SamplingParams]:
        """Sampling parameters of each of the `n` answers, which `schema` constrains. Raises ApiError and UserError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs=true", "top_logprobs")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.params(limit, (self.top_logprobs or 0) if self.logprobs else None, schema)


class TokenizeRequest(Body):
    """Body of /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeRequest(Body):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
    skip_special_tokens: bool = False
