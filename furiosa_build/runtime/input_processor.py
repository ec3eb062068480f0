"""Makes a request of the engine from a caller's prompt and parameters."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from pathlib import Path

from furiosa_build.artifact.schema import Artifact, KvCacheSharing
from furiosa_build.core.errors import UserError
from furiosa_build.runtime.pooling import PoolingParams, check_dimensions
from furiosa_build.runtime.prompts import Prompt, WrongTypeError, check_text, parse_prompt, truncate
from furiosa_build.runtime.request import Request
from furiosa_build.runtime.sampling.beam_search import BeamSearch
from furiosa_build.runtime.sampling.guided import Guides
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.sampling.sampler import Random
from furiosa_build.runtime.text.detokenizer import output_text
from furiosa_build.runtime.text.tokenizer import Tokenizer, end_of_sequence_ids


class InputProcessor:
    """Makes an engine's requests.

    Args:
        artifact: The artifact's description.
        model_directory: Its model/ directory.
        tokenizer: Its tokenizer, if it has one.
        seed: The seed of requests that have none of their own; drawn if None.
        max_prompt_tokens: The longest prompt that can be run.
        max_context: The longest context that can be run.

    Attributes:
        guides: Makes the guides of requests with structured output.
    """

    def __init__(
        self,
        artifact: Artifact,
        model_directory: Path,
        tokenizer: Tokenizer | None,
        seed: int | None,
        max_prompt_tokens: int,
        max_context: int,
    ) -> None:
        self._config, self._tokenizer = artifact.generator_config, tokenizer
        self._hf_config = artifact.hf_config
        self._max_prompt_tokens, self._max_context = max_prompt_tokens, max_context
        self._vocab_size = artifact.model_metadata.vocab_size
        ids = end_of_sequence_ids(model_directory, artifact.hf_config)
        self._eos = frozenset(id_ for id_ in ids if id_ < self._vocab_size)
        self._seed = secrets.randbits(63) if seed is None else seed
        self.guides = Guides(tokenizer, self._eos, self._vocab_size)

    def process(self, request_id: str, prompt: Prompt, params: SamplingParams | PoolingParams) -> Request:
        """Checks a prompt and its parameters and makes a request of them: for an embedding if they are for pooling.

        Raises:
            WrongTypeError: What is no request id, prompt or SamplingParams.
            UserError: The prompt is empty or has unknown tokens; messages that the chat template rejects; parameters
                that the artifact cannot serve.
        """
        if not isinstance(request_id, str):
            raise WrongTypeError(f"{request_id!r} is not a request id", where="request_id", valid="a str")
        pooling = params if isinstance(params, PoolingParams) else None
        if isinstance(params, PoolingParams):
            self._check_embeds(params)
            params = SamplingParams(max_tokens=0, temperature=0, truncate_prompt_tokens=params.truncate_prompt_tokens)
        self._check_supported(params)
        where = f"prompt of request {request_id!r}"
        text, tokens = self._encode(prompt, where)
        tokens = truncate(tokens, params.truncate_prompt_tokens, self._max_prompt_tokens)
        if not tokens:
            raise UserError("the prompt is empty", where=where, valid="at least one token")
        self._check_vocabulary(tokens, where)
        tokenizer = self._tokenizer if params.detokenize else None
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        return Request(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=tokens,
            params=params,
            text=output_text(tokenizer, tokens, params.stop, params.skip_special_tokens),
            generator=None if params.greedy or params.use_beam_search else self._generator(request_id, params),
            end_token_ids=ends,
            beams=self._beam_search(len(tokens), params, ends) if params.use_beam_search else None,
            guide=self.guides.make(params),
            bad_words=self._encode_bad_words(params),
            pooling=pooling,
        )

    def require_tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer. Raises UserError if it has none."""
        if self._tokenizer is None:
            raise UserError(
                "the artifact has no tokenizer, so it takes and gives token ids only",
                where="model/tokenizer.json",
                hint="give prompts as lists of token ids, without stop strings",
            )
        return self._tokenizer

    def _encode(self, prompt: Prompt, where: str) -> tuple[str | None, list[int]]:
        """The prompt as text, if it is one, and as tokens."""
        parsed = parse_prompt(prompt, where)
        if parsed.tokens is not None:
            return parsed.text, parsed.tokens
        tokenizer = self.require_tokenizer()
        if parsed.messages is not None:
            text = check_text(tokenizer.apply_chat_template(parsed.messages), where)
            return text, tokenizer.encode(text, add_special_tokens=False)
        return parsed.text, tokenizer.encode(parsed.text or "")

    def _encode_bad_words(self, params: SamplingParams) -> list[list[int]]:
        """The tokens of each text, alone and after a space."""
        texts = [space + word.lstrip() for word in params.bad_words for space in ("", " ")]
        encoded = (
            self.require_tokenizer().encode(check_text(text, "SamplingParams.bad_words"), add_special_tokens=False)
            for text in texts
        )
        return [tokens for tokens in encoded if tokens]

    def _beam_search(self, prompt: int, params: SamplingParams, end_token_ids: frozenset[int]) -> BeamSearch:
        config = self._config.kv_cache_sharing_across_beams_config
        assert config is not None
        # The token that is sampled last is never run.
        most = self._max_context + 1 - prompt
        return BeamSearch(
            config.beam_width,
            max(1, min(params.max_tokens or config.max_new_tokens, most)),
            end_token_ids,
            params.length_penalty,
            params.early_stopping,
        )

    def _generator(self, request_id: str, params: SamplingParams) -> Random:
        seed = params.seed
        if seed in (None, -1):  # -1 as in vLLM
            # From the id and not from a counter, so that the order of arrival does not matter.
            digest = hashlib.sha256(f"{self._seed} {request_id}".encode()).digest()
            seed = int.from_bytes(digest[:8], "little") >> 1
        return Random(seed)

    def _check_embeds(self, params: PoolingParams) -> None:
        if not self._config.output_last_hidden_state:
            raise UserError(
                "the artifact does not give the last hidden state, so there are no embeddings",
                where="PoolingParams",
                hint="build it with model.output_last_hidden_state=true",
            )
        check_dimensions(params, self._hf_config)

    def _check_supported(self, params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise WrongTypeError(f"{type(params).__name__} is not a SamplingParams", where="sampling_params")
        if params.use_beam_search:
            _check_beams(params, self._config.kv_cache_sharing_across_beams_config)
        if params.stop:
            self.require_tokenizer()
        self._check_vocabulary(params.stop_token_ids, "SamplingParams.stop_token_ids")
        self._check_vocabulary(params.allowed_token_ids or (), "SamplingParams.allowed_token_ids")
        self._check_vocabulary(params.logit_bias, "SamplingParams.logit_bias")
        if params.prompt_logprobs is not None and self._config.calculate_logit_only_for_last_token:
            raise UserError(
                "the artifact returns the logits of the last token only, so there are no log probabilities of prompts",
                where="SamplingParams.prompt_logprobs",
                hint="build it with model.calculate_logit_only_for_last_token=false",
            )

    def _check_vocabulary(self, tokens: Iterable[int], where: str) -> None:
        for token in tokens:
            if type(token) is not int or not 0 <= token < self._vocab_size:
                what = f"{token!r} is not a token id"
                if type(token) is int and self._tokenizer is not None and (text := self._tokenizer.token(token)):
                    what = f"the model's vocabulary lacks the token {text!r} ({token}), which its tokenizer has"
                raise UserError(what, where=where, valid=f"0 to {self._vocab_size - 1}")


def _check_beams(params: SamplingParams, config: KvCacheSharing | None) -> None:
    """Raises UserError when the artifact cannot serve a beam search of these parameters."""
    if config is None:
        raise UserError(
            "the artifact is not built for beam search",
            where="SamplingParams.use_beam_search",
            hint="build it with kv_cache_sharing_across_beams_config",
        )
    width, most = config.beam_width, config.max_new_tokens
    for name, fits, valid in (
        ("n", params.n <= width, f"at most {width}, the artifact's beam width"),
        ("best_of", params.best_of in (None, width), f"{width}, the artifact's beam width, or None"),
        ("max_tokens", (params.max_tokens or 1) <= most, f"at most {most}, the artifact's max_new_tokens for beams"),
    ):
        if not fits:
            where = f"SamplingParams.{name}"
            raise UserError(f"{name} does not take {getattr(params, name)!r} here", where=where, valid=valid)
