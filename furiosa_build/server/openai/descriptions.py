"""How /openapi.json describes what is answered. The routes make their answers themselves."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Described = dict[int | str, dict[str, Any]]

RETRY_AFTER = {
    "Retry-After": {"description": "Seconds after which to come again.", "schema": {"type": "string"}, "required": True}
}
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_EVENTS = {"text/event-stream": {"schema": _EVENT}}


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Error(_Object):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Object):
    """Any answer other than what was asked for."""

    error: Error


class Usage(_Object):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(_Object):
    """Of each token of a text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(_Object):
    """A text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(_Object):
    """Answer of /v1/completions. With `stream`, events each with a part of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TokenLogprob(_Object):
    """A token, and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TokenLogprob):
    """The token that was chosen, and the likeliest ones."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Object):
    """Of each token of a message."""

    content: list[ChatLogprob]
    refusal: None


class AssistantMessage(_Object):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(_Object):
    """An answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(_Object):
    """Answer of /v1/chat/completions. With `stream`, events each with a part of it."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(_Object):
    """What is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class Models(_Object):
    """The one model that is served."""

    object: Literal["list"]
    data: list[Model]


class Tokens(_Object):
    """Answer of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(_Object):
    """Answer of /detokenize."""

    prompt: str


class Version(_Object):
    """Of this package."""

    version: str


class Continuation(_Object):
    """What continues a prompt."""

    text: str


class ContinuedPrompt(_Object):
    """A prompt, and what continues it."""

    prompt: str
    responses: list[Continuation]


class Generated(_Object):
    """Answer of /generate to a list; that to one prompt is the text."""

    responses: list[ContinuedPrompt]


def answers(model: type[BaseModel], *, streams: bool = False) -> Described:
    """What is answered when all is well."""
    return {200: {"model": model, **({"content": _EVENTS} if streams else {})}}


GENERATED: Described = {200: {"model": Generated, "content": {"text/plain": {"schema": {"type": "string"}}, **_EVENTS}}}
METRICS: Described = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
HEALTH: Described = {503: {"description": "The model is being loaded, or the server is shutting down."}}


def _errors(**meanings: str) -> Described:
    found: Described = {}
    for status, meaning in meanings.items():
        headers = {"headers": RETRY_AFTER} if status in ("_429", "_503") else {}
        found[status.removeprefix("_")] = {"model": ErrorBody, "description": meaning, **headers}
    return found


OF_ALL = _errors(_401="No valid API key.", _500="The server failed.", _4XX="Otherwise not as it must be.")
OF_BODIES = _errors(
    _400="The request is not valid; `param` names the field.",
    _404="There is no such model.",
    _408="It took longer than `request_timeout_s`.",
    _413="The body has more than `max_body_bytes`.",
    _503="The model is being loaded, or the server is shutting down.",
)
OF_GENERATION = {**OF_BODIES, **_errors(_429="As many requests are under way as are taken.")}
