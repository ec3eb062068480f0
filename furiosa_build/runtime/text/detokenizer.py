"""Incremental detokenization: no text is given out that a later token could change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Protocol

from furiosa_build.runtime.text.tokenizer import CLEANED, Tokenizer

# What a decoder writes for invalid or incomplete characters.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_CONTEXT = 8
"""Tokens of the prompt that decoding begins with, unless it takes more to come to a text."""


class Decodes(Protocol):
    """The part of a tokenizer that detokenization needs."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


# Not tokenizers' own DecodeStream: where a tokenizer falls back to single bytes it fails at invalid ones, and it
# never gives what is left at the end. test_detokenizer.py has the tokens.
class Detokenizer:
    """Turns tokens into text piece by piece.

    A piece never ends within a character. The pieces, `flush` included, add up to what decoding all tokens at once
    gives, less the text of the prompt. (Not quite in one case: where a tokenizer falls back to single bytes and the
    tokens end within a character, decoding at once also garbles whole characters right before it, which have been
    given out by then.)

    Args:
        tokenizer: Decodes.
        skip_special_tokens: Special tokens are left out of the text.
        prompt: The tokens before. A decoder may treat the first token of a text differently: it drops the space before
            a word.
        cut: Endings of a text which the tokenizer may yet change, because of what may follow.
    """

    def __init__(
        self, tokenizer: Decodes, skip_special_tokens: bool, prompt: Sequence[int] = (), cut: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._cut = cut
        # Decoding starts at the tokens of the last piece. `_given` characters of their text have been given out.
        self._window = self._context(prompt)
        self._boundary = len(self._window)
        self._given = self._certain(self._decode(self._window))

    def push(self, token: int) -> str:
        """The text that has become certain with `token`; may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        piece = self._give(text, self._certain(text))
        # What is cleaned up depends on what was before: such texts, of a few old models, are decoded as a whole.
        if piece and self._given == len(text) and not self._cut:
            self._window = self._window[self._boundary :]
            self._boundary = len(self._window)
            self._given = len(self._decode(self._window))
        return piece

    def flush(self) -> str:
        """The rest, after the last token: incomplete characters come as U+FFFD."""
        text = self._decode(self._window)
        return self._give(text, len(text))

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, from one on that begins a character, and at least one of which is text."""
        size = _CONTEXT
        while size < len(prompt):
            text = self._decode(context := list(prompt[-size:]))
            if text.strip() and _REPLACEMENT not in text:
                return context
            size *= 2
        return list(prompt)

    def _certain(self, text: str) -> int:
        """How much of a text no later token changes."""
        whole = text.rstrip(_REPLACEMENT)
        return len(whole) - max((_overlap(whole, each) for each in self._cut), default=0)

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
        unseen: Tokens that are left out of the text, and their texts: stop strings may have these.
    """

    def __init__(
        self, detokenizer: Detokenizer | None, stop: Sequence[str], unseen: Mapping[int, str] | None = None
    ) -> None:
        self.text = ""
        self._detokenizer = detokenizer
        self._stop = stop
        self._unseen = {id_: text for id_, text in (unseen or {}).items() if any(text in each for each in stop)}
        # What is held back; of each character, whether it belongs to the text.
        self._held = ""
        self._seen: list[bool] = []

    def push(self, token: int, *, may_stop: bool) -> str | None:
        """Appends a token. Returns the stop string that ends the text, if `may_stop` and one does."""
        if self._detokenizer is None:
            return None
        self._hold(self._detokenizer.push(token), seen=True)
        self._hold(self._unseen.get(token, ""), seen=False)
        if may_stop and (found := self._find_stop()):
            at, stop = found
            self._give(at)
            return stop
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        self._give(len(self._held) - keep)
        return None

    def flush(self) -> None:
        """Gives out what is held back, at the end of a text that no stop string has ended."""
        if self._detokenizer is not None:
            self._hold(self._detokenizer.flush(), seen=True)
            self._give(len(self._held))

    def _find_stop(self) -> tuple[int, str] | None:
        """The stop string that begins first, and where."""
        found = [(self._held.find(stop), stop) for stop in self._stop]
        return min((pair for pair in found if pair[0] >= 0), default=None, key=lambda pair: pair[0])

    def _hold(self, text: str, *, seen: bool) -> None:
        self._held += text
        self._seen += [seen] * len(text)

    def _give(self, end: int) -> None:
        self.text += "".join(compress(self._held[:end], self._seen[:end]))
        self._held, self._seen = self._held[end:], self._seen[end:]


def output_text(
    tokenizer: Tokenizer | None, prompt: Sequence[int], stop: Sequence[str] = (), skip_special_tokens: bool = True
) -> OutputText:
    """The text of a completion of `prompt`; without a tokenizer it stays empty."""
    if tokenizer is None:
        return OutputText(None, stop)
    unseen = tokenizer.special_tokens if skip_special_tokens else {}
    return OutputText(detokenizer_for(tokenizer, prompt, skip_special_tokens), stop, unseen)


def detokenizer_for(tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool = True) -> Detokenizer:
    """What turns the tokens that follow `prompt` into text."""
    # Of " n ' t" the first cleaning makes " n't".
    cut = [*(before for before, _ in CLEANED), " n ' t"] if tokenizer.cleans_up else ()
    return Detokenizer(tokenizer, skip_special_tokens, prompt, cut)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
