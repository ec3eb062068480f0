"""Requests of OpenAI's API, with the additions of vLLM's server."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.server.http.body import Body, Integer, Unsupported
from furiosa_build.server.http.errors import bad_request
from furiosa_build.server.openai.messages import Message, TemplateOptions
from furiosa_build.server.openai.sampling import MAX_LOGPROBS, MAX_N, Sampling
from furiosa_build.server.openai.structured import Structure
from furiosa_build.server.sampling_defaults import SamplingDefaults

MAX_TOOLS = 128

TokenIds = Annotated[list[Annotated[Integer, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Sampling):
    """Body of /v1/completions."""

    unsupported: ClassVar = {
        "prompt_embeds": Unsupported("give the prompt as text or token ids"),
        "suffix": Unsupported("the model continues texts, and does not fill them in", ("",)),
    }
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_N)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_N)]
    )
    max_tokens: Integer = Field(16, ge=0)
    logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = True

    @field_validator("prompt", mode="before")
    @classmethod
    def _not_empty(cls, given: Any) -> Any:
        if isinstance(given, list) and (not given or [] in given):
            raise PydanticCustomError("empty_prompt", "a prompt is empty")
        return given

    @property
    def engine_names(self) -> dict[str, str]:
        """Fields by the names that the engine's errors have for them."""
        names = super().engine_names
        return names if self.prompt_logprobs is not None else {"prompt_logprobs": "echo", **names}

    @property
    def computed_prompt_logprobs(self) -> int | None:
        """Those of `prompt_logprobs`, and with `echo` those of `logprobs`."""
        asked = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((number for number in asked if number is not None), default=None)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


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


class ChatRequest(Sampling, TemplateOptions):
    """Body of /v1/chat/completions."""

    without_effect: ClassVar = frozenset({"prediction"})
    unsupported: ClassVar = {
        "audio": Unsupported("the model writes text only"),
        "chat_template": Unsupported("the artifact's own is used"),
        "echo": Unsupported("it is for completions", (False,)),
        "function_call": Unsupported("give tool_choice", ("none",)),
        "functions": Unsupported("give tools", ([],)),
        "modalities": Unsupported("the model writes text only", (["text"],)),
        "return_prompt_text": Unsupported("ask /tokenize and /detokenize", (False,)),
        "verbosity": Unsupported("the model knows of none", ("medium",)),
        "web_search_options": Unsupported("the server searches nothing"),
    }
    messages: list[Message] = Field(min_length=1)
    max_tokens: Integer | None = Field(None, ge=1)
    max_completion_tokens: Integer | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_special_tokens: bool = False

    @property
    def limit(self) -> int | None:
        """The most tokens to generate."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def engine_names(self) -> dict[str, str]:
        """Fields by the names that the engine's errors have for them."""
        names = {"guided_json": "tools", "logprobs": "top_logprobs", "prompt": "messages"} | super().engine_names
        return names if self.max_completion_tokens is None else names | {"max_tokens": "max_completion_tokens"}

    def chat_params(self, defaults: SamplingDefaults, schema: Structure | None = None) -> list[SamplingParams]:
        """Sampling parameters of each answer, which `schema` constrains. Raises ApiError and UserError."""
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs=true", "top_logprobs")
        limit = defaults.max_tokens if self.limit is None else self.limit
        return self.params(defaults.params, limit, (self.top_logprobs or 0) if self.logprobs else None, schema)


class TokenizeRequest(TemplateOptions):
    """Body of /tokenize: a text, or a conversation."""

    without_effect: ClassVar = frozenset({"mm_processor_kwargs"})
    unsupported: ClassVar = {
        "chat_template": Unsupported("the artifact's own is used"),
    }
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    add_special_tokens: bool | None = Field(None, description="By default to a text, and not to a conversation.")
    return_token_strs: bool = Field(False, description="What the vocabulary calls each token is in `token_strs`.")


class DetokenizeRequest(Body):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[Annotated[Integer, Field(ge=0)]]
    skip_special_tokens: bool = False
