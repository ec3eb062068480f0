"""Incremental detokenization: no text is given out that a later token could change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# What a decoder writes for invalid or incomplete characters.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Decodes(Protocol):
    """The part of a tokenizer that detokenization needs."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


# Not tokenizers' own DecodeStream: where a tokenizer falls back to single bytes it fails at invalid ones, and it
# never gives what is left at the end. test_detokenizer.py has the tokens.
class Detokenizer:
    """Turns tokens into text piece by piece.

    A piece never ends within a character. The pieces, `flush` included, add up to what decoding all tokens at
    once gives. (Not quite in one case: where a tokenizer falls back to single bytes and the tokens end within
    a character, decoding at once also garbles whole characters right before it, which have been given out by
    then.)
    """

    def __init__(self, tokenizer: Decodes, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # Decoding starts at the tokens of the last piece, because a decoder may treat a first token
        # differently (it drops the space before it). `_given` characters of their text have been given out.
        self._window: list[int] = []
        self._boundary = 0
        self._given = 0

    def push(self, token: int) -> str:
        """The text that has become certain with `token`; may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        piece = self._give(text, len(text.rstrip(_REPLACEMENT)))
        if piece and self._given == len(text):
            self._window = self._window[self._boundary :]
            self._boundary = len(self._window)
            self._given = len(self._decode(self._window))
        return piece

    def flush(self) -> str:
        """The rest, after the last token: incomplete characters come as U+FFFD."""
        text = self._decode(self._window)
        return self._give(text, len(text))

    def _give(self, text: str, end: int) -> str:
        piece = text[self._given : end]
        self._given += len(piece)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


class OutputText:
    """The text of a completion, cut off before the first stop string.

    `text` only grows. An end that could be the beginning of a stop string is held back until it is clear.

    Args:
        detokenizer: Makes the text; without one it stays empty.
        stop: Strings that end it.
    """

    def __init__(self, detokenizer: Detokenizer | None, stop: Sequence[str]) -> None:
        self.text = ""
        self._detokenizer = detokenizer
        self._stop = stop
        self._held = ""

    def push(self, token: int, *, may_stop: bool) -> str | None:
        """Appends a token. Returns the stop string that ends the text, if `may_stop` and one does."""
        if self._detokenizer is None:
            return None
        self._held += self._detokenizer.push(token)
        if may_stop and (found := self._find_stop()):
            at, stop = found
            self.text += self._held[:at]
            return stop
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        self._give(len(self._held) - keep)
        return None

    def flush(self) -> None:
        """Gives out what is held back, at the end of a text that no stop string has ended."""
        if self._detokenizer is not None:
            self._held += self._detokenizer.flush()
            self._give(len(self._held))

    def _find_stop(self) -> tuple[int, str] | None:
        """The stop string that begins first, and where."""
        found = [(self._held.find(stop), stop) for stop in self._stop]
        return min((pair for pair in found if pair[0] >= 0), default=None, key=lambda pair: pair[0])

    def _give(self, end: int) -> None:
        self.text += self._held[:end]
        self._held = self._held[end:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
