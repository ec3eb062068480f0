"""The responses as /openapi.json describes them. The routes make them themselves."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Described = dict[int | str, dict[str, Any]]

RETRY_AFTER = {
    "Retry-After": {"description": "Seconds after which to retry.", "schema": {"type": "string"}, "required": True}
}
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_EVENTS = {"text/event-stream": {"schema": _EVENT}}


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Error(_Object):
    """An error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Object):
    """The response to a request that failed."""

    error: Error


class Usage(_Object):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(_Object):
    """Log probabilities of the tokens of a text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class PromptLogprob(_Object):
    """A token of a prompt's position, and its log probability."""

    logprob: float
    rank: int
    decoded_token: str | None


class CompletionChoice(_Object):
    """A completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class Completion(_Object):
    """Response of /v1/completions. With `stream`, events with a chunk each."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class PromptUsage(_Object):
    """Numbers of tokens where none are generated."""

    prompt_tokens: int
    total_tokens: int


class Embedding(_Object):
    """The embedding of an input: numbers, or their bytes in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(_Object):
    """Response of /v1/embeddings."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: PromptUsage


class Score(_Object):
    """How alike two texts are."""

    object: Literal["score"]
    index: int
    score: float


class Scores(_Object):
    """Response of /score."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: PromptUsage


class RankedText(_Object):
    """The text of a document."""

    text: str


class Ranked(_Object):
    """A document, by its index in the request."""

    index: int
    relevance_score: float
    document: RankedText | None = None


class Ranking(_Object):
    """Response of /rerank, the best first."""

    id: str
    created: int
    model: str
    results: list[Ranked]
    usage: PromptUsage


class TokenLogprob(_Object):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TokenLogprob):
    """The token that was chosen, and the most likely ones."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Object):
    """Log probabilities of the tokens of a message."""

    content: list[ChatLogprob]
    refusal: None


class AssistantMessage(_Object):
    """The model's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(_Object):
    """A choice of a chat completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(_Object):
    """Response of /v1/chat/completions. With `stream`, events with a chunk each."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class ResponseUsage(_Object):
    """Numbers of tokens of a response."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(BaseModel):
    """Response of /v1/responses. With `stream`, events with its parts, and it as a whole in the last."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    output: list[dict[str, Any]]
    store: Literal[False]
    usage: ResponseUsage


class Model(_Object):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class Models(_Object):
    """A list of the one model that is served."""

    object: Literal["list"]
    data: list[Model]


class Tokens(_Object):
    """Response of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str | None] | None = None


class TokenizerInfo(BaseModel):
    """Response of /tokenizer_info: the fields of tokenizer_config.json."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str


class Text(_Object):
    """Response of /detokenize."""

    prompt: str


class Version(_Object):
    """Version of this package."""

    version: str


class Continuation(_Object):
    """A text that continues a prompt."""

    text: str


class ContinuedPrompt(_Object):
    """A prompt and the texts that continue it."""

    prompt: str
    responses: list[Continuation]


class Generated(_Object):
    """Response of /generate to a list; that to one prompt is the text."""

    responses: list[ContinuedPrompt]


def answers(model: type[BaseModel], *, streams: bool = False) -> Described:
    """The description of a successful response."""
    return {200: {"model": model, **({"content": _EVENTS} if streams else {})}}


GENERATED: Described = {200: {"model": Generated, "content": {"text/plain": {"schema": {"type": "string"}}, **_EVENTS}}}
METRICS: Described = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
HEALTH: Described = {503: {"description": "The model is being loaded, or the server is shutting down."}}


NO_MODEL: Described = {404: {"model": ErrorBody, "description": "The model does not exist."}}


def _errors(**meanings: str) -> Described:
    found: Described = {}
    for status, meaning in meanings.items():
        headers = {"headers": RETRY_AFTER} if status in ("_429", "_503") else {}
        found[status.removeprefix("_")] = {"model": ErrorBody, "description": meaning, **headers}
    return found


OF_ALL = _errors(_401="No valid API key.", _500="Internal server error.", _4XX="Another invalid request.")
OF_BODIES = _errors(
    _400="The request is not valid; `param` names the field.",
    _404="The model does not exist.",
    _408="It took longer than `request_timeout_s`.",
    _413="The body has more than `max_body_bytes`.",
    _503="The model is being loaded, or the server is shutting down.",
)
OF_GENERATION = {**OF_BODIES, **_errors(_429="Too many requests are in flight.")}
