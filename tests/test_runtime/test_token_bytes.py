"""The bytes of tokens: one after the other they are those of the text."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers_of_models import byte_level, sentencepiece_like, word_piece, write

from furiosa_build.runtime.text.tokenizer import Tokenizer

TEXTS = ("a b  c", "caf\u00e9 \u72d0\U0001f98a", "<s>a</s> b")


@pytest.mark.parametrize("made", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("text", TEXTS)
def test_they_join_to_the_text(tmp_path: Path, made: type[FastTokenizer], text: str) -> None:
    tokenizer = Tokenizer(write(tmp_path, made()))
    ids = tokenizer.encode("a") + (rest := tokenizer.encode(text))
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert b"a" + b"".join(tokenizer.token_bytes[id_] for id_ in rest) == whole.encode()


def test_words_of_word_piece_have_their_space(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path, word_piece()))
    assert [tokenizer.token_bytes.text(id_) for id_ in tokenizer.encode("ab c")] == [" a", "b", " c"]


def test_parts_of_a_character(tmp_path: Path) -> None:
    for made, of_byte in ((byte_level, 0), (sentencepiece_like, 3)):
        tokenizer = Tokenizer(write(tmp_path, made()))
        for byte in (0x00, 0x41, 0x80, 0xF0, 0xFF):
            assert tokenizer.token_bytes[byte + of_byte] == bytes([byte])
        assert tokenizer.token_bytes.text(0xF0 + of_byte) == "\ufffd"


def test_an_id_without_a_token_has_none(tmp_path: Path) -> None:
    assert Tokenizer(write(tmp_path, byte_level())).token_bytes[4000] == b""
