"""The bytes that a token stands for, wherever it comes in a text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How a vocabulary with byte fallback names a single byte."""


class TokenBytes:
    """The bytes of each token of a tokenizer: its text within a text, or the part of a character that it is."""

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        self._decoders = set() if fast.decoder is None else set(_types(json.loads(fast.decoder.__getstate__())))
        self._known: dict[int, bytes] = {}

    def __getitem__(self, id_: int) -> bytes:
        """The bytes of a token; none of an id that is not one."""
        if id_ not in self._known:
            self._known[id_] = self._find(id_)
        return self._known[id_]

    def text(self, id_: int) -> str:
        """The text of a token; U+FFFD for parts of characters."""
        return self[id_].decode(errors="replace")

    def _find(self, id_: int) -> bytes:
        token = self._fast.id_to_token(id_)
        if token is None:
            return b""
        if "ByteLevel" in self._decoders:
            # As the decoder does: a token that is not written in these letters is its own text.
            found = [_BYTE_OF_LETTER.get(letter) for letter in token]
            return token.encode() if None in found else bytes(byte for byte in found if byte is not None)
        if "ByteFallback" in self._decoders and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        before = self._decode([self._anchor] if self._anchor is not None else [])
        after = self._decode([self._anchor, id_] if self._anchor is not None else [id_])
        return after.removeprefix(before).encode()

    @cached_property
    def _anchor(self) -> int | None:
        """A token with a text of its own: a decoder may drop the space before the first token of a text."""
        size = self._fast.get_vocab_size()
        return next((id_ for id_ in range(size) if (text := self._decode([id_])).isalnum() and text.isascii()), None)

    def _decode(self, ids: list[int]) -> str:
        return str(self._fast.decode(ids, skip_special_tokens=False))


def _types(decoder: dict[str, Any]) -> Iterator[str]:
    """The types of a decoder and its parts."""
    yield decoder["type"]
    for part in decoder.get("decoders", []):
        yield from _types(part)


def _letters() -> dict[str, int]:
    """The letters of a byte-level vocabulary, with their bytes: those that can be shown stand for themselves."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF_LETTER = _letters()
