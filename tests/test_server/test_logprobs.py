"""Log probabilities as OpenAI's API has them: the texts, bytes and places of tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers_of_models import byte_level, sentencepiece_like, write

from furiosa_build.runtime.request import Logprob
from furiosa_build.runtime.text.detokenizer import output_text
from furiosa_build.runtime.text.tokenizer import Tokenizer
from furiosa_build.server.openai.responses import TokenOffsets, chat_logprobs, completion_logprobs


def entry(*ids: int) -> dict[int, Logprob]:
    """Of a token, which is the likeliest, and others."""
    return {id_: Logprob(-float(rank), rank, None) for rank, id_ in enumerate(ids, start=1)}


def test_parts_of_a_character(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path, byte_level()))
    tokens = [*"a\U0001f600b".encode()]
    logprobs = [entry(token, 0x80, 0x81, 0x82) for token in tokens]
    chat = chat_logprobs(tokens, logprobs, 4, tokenizer)["content"]
    assert bytes(byte for each in chat for byte in each["bytes"]).decode() == "a\U0001f600b"
    assert [each["token"] for each in chat] == ["a", "\\xf0", "\\x9f", "\\x98", "\\x80", "b"]
    assert [other["bytes"] for other in chat[0]["top_logprobs"]] == [[97], [0x80], [0x81], [0x82]]
    legacy = completion_logprobs(tokens, logprobs, 3, tokenizer, TokenOffsets(tokenizer, []))
    assert legacy["text_offset"] == [0, 1, 1, 1, 1, 2]
    assert list(legacy["top_logprobs"][0]) == ["a", "bytes:\\x80", "bytes:\\x81"]


def test_alternatives_of_one_text_are_told_apart(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path, sentencepiece_like()))
    [_, a], byte = tokenizer.encode("aa"), 3 + ord("a")  # the bytes follow <unk>, <s> and </s>
    legacy = completion_logprobs([a], [entry(a, byte)], 2, tokenizer, TokenOffsets(tokenizer, [a]))
    assert legacy["top_logprobs"] == [{"a": -1.0, f"token_id:{byte}": -2.0}]


@pytest.mark.parametrize("made", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("skip", [True, False])
def test_offsets_are_places_in_the_text(tmp_path: Path, made: Callable[[], FastTokenizer], skip: bool) -> None:
    tokenizer = Tokenizer(write(tmp_path, made()))
    prompt, tokens = tokenizer.encode("a b"), tokenizer.encode("c<s> d\u72d0e")
    output = output_text(tokenizer, prompt, skip_special_tokens=skip)
    for token in tokens:
        output.push(token, may_stop=False)
    output.flush()
    offsets = TokenOffsets(tokenizer, prompt, skip, start=3).next(tokens)
    for token, offset in zip(tokens, offsets, strict=True):
        text = tokenizer.token_bytes.text(token)
        if "\ufffd" not in text and not (skip and token in tokenizer.special_tokens):
            assert output.text.startswith(text, offset - 3)


def test_without_a_tokenizer_tokens_have_numbers() -> None:
    legacy = completion_logprobs([5], [entry(5, 6)], 2, None, TokenOffsets(None, []))
    assert legacy == {
        "tokens": ["token_id:5"],
        "token_logprobs": [-1.0],
        "top_logprobs": [{"token_id:5": -1.0, "token_id:6": -2.0}],
        "text_offset": [0],
    }
