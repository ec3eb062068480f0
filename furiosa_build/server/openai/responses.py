"""Bodies of OpenAI's responses, and the deltas of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from furiosa_build.runtime.request import CompletionOutput, Logprob
from furiosa_build.server.openai.sampling import Sampling

Json = dict[str, Any]


class ResponseWriter:
    """Writes the response to one request, whole or in chunks.

    Args:
        kind: `text_completion` or `chat.completion`.
        prefix: The prefix of its id.
        body: The request.
    """

    def __init__(self, kind: str, prefix: str, body: Sampling) -> None:
        self._kind = kind
        name = body.request_id or uuid.uuid4().hex
        self._head = {"id": f"{prefix}-{name}", "created": int(time.time()), "model": body.model}

    def body(self, choices: list[Json], usage: Json) -> Json:
        """The whole response."""
        return {**self._head, "object": self._kind, "choices": choices, "usage": usage}

    def chunk(self, choices: list[Json], **usage: Json | None) -> Json:
        """A chunk of a stream."""
        kind = self._kind + ".chunk" if self._kind == "chat.completion" else self._kind
        return {**self._head, "object": kind, "choices": choices, **usage}


def usage(prompt_tokens: int, generated_tokens: int) -> Json:
    """The number of tokens of prompts and completions."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated_tokens,
        "total_tokens": prompt_tokens + generated_tokens,
    }


class TextDeltas:
    """Follows one text and gives what is new of it. `is_first` until something has been given."""

    def __init__(self) -> None:
        self._characters = self._tokens = 0
        self._offset = 0
        self.is_first = True

    def next(self, output: CompletionOutput) -> tuple[str, list[int], list[dict[int, Logprob]] | None]:
        """New text, new tokens, and their log probabilities if asked for."""
        self.is_first = False
        text = output.text[self._characters :]
        tokens = output.token_ids[self._tokens :]
        logprobs = None if output.logprobs is None else output.logprobs[self._tokens :]
        self._characters, self._tokens = len(output.text), len(output.token_ids)
        return text, tokens, logprobs

    def completion_logprobs(self, tokens: Sequence[int], logprobs: Sequence[dict[int, Logprob]], number: int) -> Json:
        """The log probabilities for /v1/completions. Offsets are those of the tokens' own texts one after the other."""
        texts = [_text(entry[token]) for token, entry in zip(tokens, logprobs, strict=True)]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        likeliest = [
            {_text(each): each.logprob for each in entry.values() if each.rank <= number} for entry in logprobs
        ]
        return {
            "tokens": texts,
            "token_logprobs": [entry[token].logprob for token, entry in zip(tokens, logprobs, strict=True)],
            "top_logprobs": likeliest if number else None,
            "text_offset": offsets,
        }


def chat_logprobs(tokens: Sequence[int], logprobs: Sequence[dict[int, Logprob]], number: int) -> Json:
    """The log probabilities in the form of /v1/chat/completions."""
    return {
        "content": [
            _chat_logprob(entry[token])
            | {"top_logprobs": [_chat_logprob(each) for each in _ranked(entry) if each.rank <= number]}
            for token, entry in zip(tokens, logprobs, strict=True)
        ],
        "refusal": None,
    }


def _chat_logprob(each: Logprob) -> Json:
    text = _text(each)
    return {"token": text, "logprob": each.logprob, "bytes": list(text.encode())}


def _ranked(entry: dict[int, Logprob]) -> list[Logprob]:
    return sorted(entry.values(), key=lambda each: each.rank)


def _text(each: Logprob) -> str:
    return each.decoded_token or ""
