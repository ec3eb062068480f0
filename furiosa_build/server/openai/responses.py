"""Bodies of OpenAI's responses, and the deltas of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from furiosa_build.runtime.request import CompletionOutput, Logprob
from furiosa_build.runtime.text.detokenizer import detokenizer_for
from furiosa_build.runtime.text.tokenizer import Tokenizer
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
        self.is_first = True

    def next(self, output: CompletionOutput) -> tuple[str, list[int], list[dict[int, Logprob]] | None]:
        """New text, new tokens, and their log probabilities if asked for."""
        self.is_first = False
        text = output.text[self._characters :]
        tokens = output.token_ids[self._tokens :]
        logprobs = None if output.logprobs is None else output.logprobs[self._tokens :]
        self._characters, self._tokens = len(output.text), len(output.token_ids)
        return text, tokens, logprobs


class TokenOffsets:
    """Where in a text its tokens begin, in characters. A part of a character begins where the character does.

    Args:
        tokenizer: The artifact's; without one the text is empty.
        prompt: The tokens before the text.
        skip_special_tokens: The text is without special tokens.
        start: Where the text begins: behind what is repeated of the prompt.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, prompt: Sequence[int], skip_special_tokens: bool = True, start: int = 0
    ) -> None:
        self._text = tokenizer and detokenizer_for(tokenizer, prompt, skip_special_tokens)
        self._offset = start

    def next(self, tokens: Sequence[int]) -> list[int]:
        """Where the next tokens begin."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._text.push(token)) if self._text else 0
        return offsets


def completion_logprobs(
    tokens: Sequence[int],
    logprobs: Sequence[dict[int, Logprob] | None],
    number: int,
    tokenizer: Tokenizer | None,
    offsets: TokenOffsets,
) -> Json:
    """The log probabilities in the form of /v1/completions. Of a first token there is none.

    The likeliest tokens are keyed by their texts. One whose text another has already is called `token_id:NUMBER`.
    """
    return {
        "tokens": [_legacy_text(tokenizer, token) for token in tokens],
        "token_logprobs": [
            None if entry is None else _finite(entry[token].logprob)
            for token, entry in zip(tokens, logprobs, strict=True)
        ],
        "top_logprobs": [_likeliest(entry, number, tokenizer) for entry in logprobs] if number else None,
        "text_offset": offsets.next(tokens),
    }


def _likeliest(entry: dict[int, Logprob] | None, number: int, tokenizer: Tokenizer | None) -> dict[str, float] | None:
    if entry is None:
        return None
    found: dict[str, float] = {}
    for id_, each in _ranked(entry, number):
        text = _legacy_text(tokenizer, id_)
        found[f"token_id:{id_}" if text in found else text] = _finite(each.logprob)
    return found


def prompt_logprobs(logprobs: Sequence[dict[int, Logprob] | None], number: int) -> list[Json | None]:
    """The log probabilities of a prompt as vLLM gives them: for each token those of it and the likeliest, by id."""
    return [
        None
        if entry is None
        else {
            str(token): {"logprob": _finite(each.logprob), "rank": each.rank, "decoded_token": each.decoded_token}
            for position, (token, each) in enumerate(entry.items())
            if position == 0 or each.rank <= number  # the token itself comes first
        }
        for entry in logprobs
    ]


def chat_logprobs(
    tokens: Sequence[int], logprobs: Sequence[dict[int, Logprob]], number: int, tokenizer: Tokenizer
) -> Json:
    """The log probabilities in the form of /v1/chat/completions."""
    return {
        "content": [
            _chat_logprob(token, entry[token], tokenizer)
            | {"top_logprobs": [_chat_logprob(id_, each, tokenizer) for id_, each in _ranked(entry, number)]}
            for token, entry in zip(tokens, logprobs, strict=True)
        ],
        "refusal": None,
    }


def _chat_logprob(id_: int, each: Logprob, tokenizer: Tokenizer) -> Json:
    found = tokenizer.token_bytes[id_]
    return {"token": _text(found) or _escaped(found), "logprob": _finite(each.logprob), "bytes": list(found)}


def _ranked(entry: dict[int, Logprob], number: int) -> list[tuple[int, Logprob]]:
    """The `number` likeliest, the likeliest first."""
    return sorted(((id_, each) for id_, each in entry.items() if each.rank <= number), key=lambda item: item[1].rank)


def _legacy_text(tokenizer: Tokenizer | None, id_: int) -> str:
    if tokenizer is None:
        return f"token_id:{id_}"
    found = tokenizer.token_bytes[id_]
    text = _text(found)
    return f"bytes:{_escaped(found)}" if text is None else text


def _finite(logprob: float) -> float:
    """A log probability as JSON can hold it: OpenAI's API has -9999 for what is impossible."""
    return max(logprob, -9999.0)


def _text(token: bytes) -> str | None:
    """The text of a token; None: it is a part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None


def _escaped(token: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in token)
