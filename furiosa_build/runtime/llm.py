"""Many prompts in, all their completions out."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from furiosa_build.artifact.reader import OpenArtifact
from furiosa_build.core.errors import UserError
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.pooling import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingParams,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    cosine,
)
from furiosa_build.runtime.prompts import Prompt, WrongTypeError, check_messages, check_text, list_prompts
from furiosa_build.runtime.request import RequestOutput
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.text.chat_template import Message

_Params = SamplingParams | PoolingParams


class LLM:
    """Offline generation from an artifact. The arguments are those of LLMEngine.

    Raises:
        UserError: The artifact cannot be used, or an argument is out of range.
        VerificationError: The artifact is not signed with `public_key`.
    """

    def __init__(
        self,
        artifact: str | Path | OpenArtifact,
        *,
        paged_attention_num_blocks: int | None = None,
        seed: int | None = None,
        verify: Literal["fast", "full"] = "fast",
        public_key: str | Path | None = None,
        enable_prefix_caching: bool = True,
        num_threads: int | None = None,
        pin_threads: bool = False,
    ) -> None:
        self.engine = LLMEngine(
            artifact,
            paged_attention_num_blocks=paged_attention_num_blocks,
            seed=seed,
            verify=verify,
            public_key=public_key,
            enable_prefix_caching=enable_prefix_caching,
            num_threads=num_threads,
            pin_threads=pin_threads,
        )
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts.

        Args:
            prompts: A text, a list of token ids, a conversation (a list of messages), or a list of any of these; also
                in vLLM's forms, see `Prompt`.
            sampling_params: For all prompts, or one per prompt; `SamplingParams()` if None.

        Returns:
            One finished output per prompt, in the order of the prompts.

        Raises:
            WrongTypeError: A TypeError and a UserError: what is no prompt or SamplingParams.
            UserError: A prompt or parameters that the artifact cannot serve. Nothing is left running.
        """
        return self._run(list_prompts(prompts), sampling_params if sampling_params is not None else SamplingParams())

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Embeddings of prompts, as vLLM makes them with a causal model: see `PoolingParams`.

        Raises:
            WrongTypeError: A TypeError and a UserError: what is no prompt or PoolingParams.
            UserError: The artifact does not give the last hidden state; a prompt that it cannot serve.
        """
        outputs = self._run(list_prompts(prompts), pooling_params if pooling_params is not None else PoolingParams())
        return [
            EmbeddingRequestOutput(
                output.request_id,
                output.prompt_token_ids,
                EmbeddingOutput(output.embedding or []),
                num_cached_tokens=output.num_cached_tokens,
            )
            for output in outputs
        ]

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        pooling_task: str = "embed",
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """The embeddings that `embed` gives, as tensors. Raises as `embed`; UserError too for another task."""
        if pooling_task != "embed":
            raise UserError(f"{pooling_task!r} is not supported", where="pooling_task", valid="embed")
        import torch

        return [
            PoolingRequestOutput(
                output.request_id,
                output.prompt_token_ids,
                PoolingOutput(torch.tensor(output.outputs.embedding)),
                num_cached_tokens=output.num_cached_tokens,
            )
            for output in self.embed(prompts, pooling_params)
        ]

    def score(
        self,
        data_1: Prompt | Sequence[Prompt],
        data_2: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
    ) -> list[ScoringRequestOutput]:
        """How alike prompts are: the cosine of their embeddings. One of `data_1` goes with each of `data_2`, or 1:1.

        Raises as `embed`; UserError too for numbers of prompts that do not go together.
        """
        first, second = list_prompts(data_1), list_prompts(data_2)
        if not first or not second or len(first) not in (1, len(second)):
            what = f"{len(first)} prompts do not go with {len(second)}"
            raise UserError(what, where="data_1", valid="one, or as many as in data_2")
        embedded = self.embed([*first, *second], pooling_params)
        ours, theirs = embedded[: len(first)], embedded[len(first) :]
        ours = ours * len(theirs) if len(ours) == 1 else ours
        return [
            ScoringRequestOutput(
                f"{one.request_id}_{other.request_id}",
                one.prompt_token_ids + other.prompt_token_ids,
                ScoringOutput(cosine(one.outputs.embedding, other.outputs.embedding)),
            )
            for one, other in zip(ours, theirs, strict=True)
        ]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or a list of them; a message is a dict with `role` and `content`.

        `continue_final_message` goes on with the last message (and needs `add_generation_prompt=False`);
        `chat_template_kwargs` are further variables of the chat template.

        Returns and raises as `generate`; UserError too if the artifact has no chat template or it rejects
        them.
        """
        several = isinstance(messages, Sequence) and bool(messages) and not isinstance(messages[0], Mapping | str)
        tokenizer = self.engine.require_tokenizer()
        prompts = []
        for conversation in messages if several else [messages]:
            turns = check_messages(conversation, "messages")
            options = {
                **(chat_template_kwargs or {}),
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
            }
            text = tokenizer.apply_chat_template(turns, tools=tools, **options)
            prompts.append(tokenizer.encode(check_text(text, "messages"), add_special_tokens=False))
        return self.generate(prompts, sampling_params)

    def _run(self, prompts: Sequence[Prompt], params: _Params | Sequence[_Params]) -> list[RequestOutput]:
        """The finished output of each prompt. `params` are for all, or one per prompt."""
        if not isinstance(params, SamplingParams | PoolingParams | Sequence):
            raise WrongTypeError(f"{type(params).__name__} is not a SamplingParams", where="sampling_params")
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(
                f"{len(each)} sampling parameters for {len(prompts)} prompts",
                where="sampling_params",
                valid="one for all, or one per prompt",
            )
        ids = [str(self._num_requests + number) for number in range(len(prompts))]
        self._num_requests += len(prompts)
        todo = deque(zip(ids, prompts, each, strict=True))
        finished: dict[str, RequestOutput] = {}
        try:
            while todo or self.engine.has_unfinished_requests():
                while todo and not self.engine.is_full:
                    self.engine.add_request(*todo.popleft())
                finished.update((output.request_id, output) for output in self.engine.step() if output.finished)
        finally:
            self.engine.abort_request(ids)  # none are left but after an error
        return [finished[id_] for id_ in ids]
