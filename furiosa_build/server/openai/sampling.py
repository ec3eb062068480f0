"""The fields of a request that say how its texts are chosen, and the engine's parameters that they become."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from furiosa_build.runtime.request import CompletionOutput
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.server.http.body import Body, Integer, Unsupported
from furiosa_build.server.http.errors import bad_request
from furiosa_build.server.openai.structured import Structure, Structured
from furiosa_build.server.openai.truncation import Truncation

MAX_N = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20

LEAST_TOP_P = 1e-9
"""Stands for a top_p of 0, which OpenAI takes: the likeliest token alone."""

_NAMED_ALIKE = (
    "temperature",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
)
"""Fields that are a parameter of the engine of the same name, and may have a default of the server's own."""

_NOT_HERE = "this server has none of it"


class StreamOptions(Body):
    """`include_usage`: a last chunk with the numbers of tokens; `continuous_usage_stats`: every chunk has them."""

    without_effect: ClassVar = frozenset({"include_obfuscation"})
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampling(Structured, Truncation):
    """The fields that completions and chats have in common. Fields from `top_k` on are vLLM's additions."""

    without_effect: ClassVar = frozenset(
        {
            "include_reasoning",
            "media_io_kwargs",
            "metadata",
            "mm_processor_kwargs",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "routed_experts_prompt_start",
            "safety_identifier",
            "service_tier",
            "session_id",
            "spaces_between_special_tokens",
            "store",
            "stream_interval",
            "user",
        }
    )
    unsupported: ClassVar = {
        "cache_salt": Unsupported("requests share the prefix cache; it can be turned off for the server"),
        "ec_transfer_params": Unsupported(_NOT_HERE),
        "kv_transfer_params": Unsupported(_NOT_HERE),
        "logits_processors": Unsupported(_NOT_HERE, ([],)),
        "logprob_token_ids": Unsupported(_NOT_HERE),
        "moderation": Unsupported(_NOT_HERE),
        "priority": Unsupported("requests are served in the order in which they come", (0,)),
        "repetition_detection": Unsupported(_NOT_HERE),
        "return_token_ids": Unsupported(_NOT_HERE, (False,)),
        "return_tokens_as_token_ids": Unsupported(_NOT_HERE, (False,)),
        "thinking_token_budget": Unsupported(_NOT_HERE, (-1,)),
        "vllm_xargs": Unsupported(_NOT_HERE, ({},)),
        "watermarking": Unsupported(_NOT_HERE, (False,)),
    }

    model: str
    n: Integer = Field(1, ge=1, le=MAX_N)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] = Field({}, max_length=1024)
    seed: Integer | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] = Field([], description=f"At most {MAX_STOPS}, none empty.")
    stream: bool = False
    stream_options: StreamOptions | None = None

    top_k: Integer | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: Integer | None = Field(None, ge=0)
    stop_token_ids: list[Integer] = Field([], max_length=1024)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    allowed_token_ids: list[Integer] | None = None
    bad_words: list[str] = Field([], max_length=1024)
    best_of: Integer | None = Field(None, ge=1, le=MAX_N)
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool = False
    request_id: str | None = Field(None, max_length=128)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def every_chunk_has_usage(self) -> bool:
        """Whether every chunk of a stream has the numbers of tokens so far."""
        return self.includes_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def computed_prompt_logprobs(self) -> int | None:
        """How many alternatives the engine gives for each token of a prompt; None: it gives nothing for prompts."""
        return self.prompt_logprobs

    @property
    def drawn(self) -> int:
        """How many texts are drawn for each prompt, of which `n` are shown."""
        return self.n if self.best_of is None or self.use_beam_search else self.best_of

    def params(
        self, defaults: Mapping[str, Any], max_tokens: int | None, logprobs: int | None, schema: Structure | None = None
    ) -> list[SamplingParams]:
        """Sampling parameters of each text that is drawn; of a beam search, one for all.

        Args:
            defaults: Parameters that the request may not give, by the engine's names.
            max_tokens: The most tokens of a text.
            logprobs: How many alternatives are shown with each token; None: no log probabilities are.
            schema: Constrains the text.

        Raises:
            ApiError: Fields that do not go together, or values that the engine does not take.
        """
        self._refuse_conflicts()
        structure = self.structure()
        if schema is not None and structure is not None:
            raise bad_request(f"{structure.field} and {schema.field} do not go together", structure.field)
        constraint = schema or structure
        given = {name: value for name in _NAMED_ALIKE if (value := getattr(self, name)) is not None}
        if self.top_p == 0:
            given["top_p"] = LEAST_TOP_P
        common = {
            "max_tokens": max_tokens,
            "logprobs": 0 if logprobs is None and self.drawn > self.n else logprobs,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop,
            "stop_token_ids": self.stop_token_ids,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "allowed_token_ids": self.allowed_token_ids,
            "bad_words": self.bad_words,
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
            "logit_bias": self._logit_bias(),
            "prompt_logprobs": self.computed_prompt_logprobs,
            **(constraint.guided if constraint is not None else {}),
        }
        if self.use_beam_search:
            of_beams = {name: getattr(self, name) for name in ("n", "best_of", "length_penalty", "early_stopping")}
            return [SamplingParams(use_beam_search=True, **of_beams, **common, **given)]
        return [
            SamplingParams(**common, **{**defaults, **given}, seed=self._seed(index)) for index in range(self.drawn)
        ]

    def best(self, outputs: Sequence[CompletionOutput]) -> list[CompletionOutput]:
        """The texts to show of those drawn: of each prompt's the n whose tokens are the likeliest, on average."""
        if self.drawn == self.n:
            return list(outputs)
        of_each = [outputs[begin : begin + self.drawn] for begin in range(0, len(outputs), self.drawn)]
        return [output for drawn in of_each for output in sorted(drawn, key=_mean_logprob, reverse=True)[: self.n]]

    def _refuse_conflicts(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is for streams only: give stream=true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise bad_request("prompt_logprobs are not for streams: give stream=false", "prompt_logprobs")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stops) > MAX_STOPS:
            raise bad_request(f"{len(stops)} stop strings; at most {MAX_STOPS} are accepted", "stop")
        if not all(stops):
            raise bad_request("stop: a stop string is empty", "stop")
        if self.best_of is not None and self.best_of < self.n:
            raise bad_request(f"best_of is {self.best_of}, and n {self.n}, which is more", "best_of")
        for name, prevents in (("use_beam_search", self.use_beam_search), ("best_of", self.drawn > self.n)):
            if self.stream and prevents:
                raise bad_request(f"with {name} the texts are known at the end only: give stream=false", "stream")

    def _logit_bias(self) -> dict[int, float]:
        for token in self.logit_bias:
            if not (token.isascii() and token.isdecimal() and len(token) < 10):
                raise bad_request(f"logit_bias: {token!r} is not a token id", "logit_bias")
        return {int(token): value for token, value in self.logit_bias.items()}

    def _seed(self, index: int) -> int | None:
        """The seed of one of the texts; that of the first is the request's own, as far as the engine's reach."""
        if self.seed is None:
            return None
        if index == 0:
            return self.seed % 2**63
        return int.from_bytes(hashlib.sha256(f"{self.seed} {index}".encode()).digest()[:8], "little") >> 1


def _mean_logprob(output: CompletionOutput) -> float:
    return (output.cumulative_logprob or 0.0) / max(1, len(output.token_ids))
