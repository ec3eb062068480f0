from __future__ import annotations

from collections.abc import Sequence

import pytest
import tokenizers_of_models
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from furiosa_build.runtime.text import detokenizer
from furiosa_build.runtime.text.detokenizer import Detokenizer, OutputText
from furiosa_build.runtime.text.tokenizer import Tokenizer as RuntimeTokenizer

from . import toy

WORDS = ["the ", "quick ", "brün ", "狐 ", "jumps 🦊 ", "over\n", "a\ufffdb ", "👩‍👩‍👧 "]


def trained_byte_level() -> Tokenizer:
    """Byte-level BPE with merges, so that tokens may end within a character and within the next begin."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["".join(WORDS) * 20], trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As of Llama 2: words begin with U+2581, the first space is dropped, unknown characters fall back to bytes."""
    vocabulary = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", "a", "b", "\u2581a", "\u2581狐", "<s>"]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend("\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


BYTES = toy.byte_tokenizer()
TRAINED = trained_byte_level()
SENTENCEPIECE = sentencepiece_like()


def pieces(tokenizer: Tokenizer, tokens: Sequence[int], skip_special_tokens: bool) -> list[str]:
    stream = Detokenizer(tokenizer, skip_special_tokens)
    return [*(stream.push(token) for token in tokens), stream.flush()]


def check(tokenizer: Tokenizer, tokens: Sequence[int], skip_special_tokens: bool) -> None:
    got = pieces(tokenizer, tokens, skip_special_tokens)
    assert "".join(got) == tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
    # What has been given out is never within a character: it begins what any longer continuation decodes to.
    for end in range(len(tokens)):
        given = "".join(got[: end + 1])
        assert not given.endswith("\ufffd")


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(0, toy.VOCAB - 1), max_size=30), skip=st.booleans())
@example(tokens=list("狐🦊".encode()), skip=True)
@example(tokens=[*"🦊".encode()[:3]], skip=True)
@example(tokens=[*"🦊".encode()[:3], 65], skip=True)
@example(tokens=[*"🦊".encode()[:2], toy.EOS, *"🦊".encode()[2:]], skip=True)
@example(tokens=[*"🦊".encode()[:2], toy.EOS, *"🦊".encode()[2:]], skip=False)
@example(tokens=[*"\ufffd".encode(), *"\ufffd".encode()], skip=True)
def test_bytes_in_any_order(tokens: list[int], skip: bool) -> None:
    check(BYTES, tokens, skip)


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(0, TRAINED.get_vocab_size() - 1), max_size=30), skip=st.booleans())
def test_merged_tokens_in_any_order(tokens: list[int], skip: bool) -> None:
    check(TRAINED, tokens, skip)


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), max_size=20))
def test_text_comes_back_as_it_was(words: list[str]) -> None:
    text = "".join(words)
    assert "".join(pieces(TRAINED, TRAINED.encode(text).ids, True)) == text


@settings(max_examples=200, deadline=None)
@given(
    chunks=st.lists(st.sampled_from(["\u2581", "a", "b", "\u2581a", "\u2581狐", "<s>", "é", "🦊", "狐"]), max_size=15),
    skip=st.booleans(),
)
def test_spaces_between_words_and_characters_in_single_bytes(chunks: list[str], skip: bool) -> None:
    tokens: list[int] = []
    for chunk in chunks:
        id_ = SENTENCEPIECE.token_to_id(chunk)
        tokens += [id_] if id_ is not None else chunk.encode()  # byte tokens come first in the vocabulary
    check(SENTENCEPIECE, tokens, skip)


def test_the_librarys_own_stream_fails_at_bytes_that_are_no_character() -> None:
    """Why there is a Detokenizer. When this test fails, DecodeStream may do instead."""
    tokens = [0x58, 0x94, SENTENCEPIECE.token_to_id("\u2581")]
    assert pieces(SENTENCEPIECE, tokens, True) == ["X", "", "\ufffd ", ""]
    stream = decoders.DecodeStream(skip_special_tokens=True)
    assert [stream.step(SENTENCEPIECE, token) for token in tokens[:2]] == ["X", None]
    with pytest.raises(Exception, match="Invalid prefix"):
        stream.step(SENTENCEPIECE, tokens[2])


def test_the_librarys_own_stream_does_not_end() -> None:
    """A text that ends within a character: the last piece is never given."""
    tokens = list("a🦊".encode()[:-1])
    stream = decoders.DecodeStream(skip_special_tokens=True)
    assert [stream.step(BYTES, token) for token in tokens] == ["a", None, None, None]
    assert "".join(pieces(BYTES, tokens, True)) == BYTES.decode(tokens) == "a\ufffd"


def test_a_character_comes_with_its_last_byte() -> None:
    assert pieces(BYTES, list("a🦊b".encode()), True) == ["a", "", "", "", "🦊", "b", ""]


def output_text(stop: Sequence[str], text: str) -> tuple[list[str], str | None, str]:
    """The text after each token of `text` (one a byte), the stop string that was found, the text at the end."""
    output = OutputText(Detokenizer(BYTES, True), stop)
    states = []
    for token in text.encode():
        found = output.push(token, may_stop=True)
        states.append(output.text)
        if found is not None:
            return states, found, output.text
    output.flush()
    return states, None, output.text


def test_what_may_become_a_stop_string_is_held_back() -> None:
    states, found, text = output_text(["end"], "a een enend")
    grown = ["a", "a ", "a ", "a e", "a e", "a een ", "a een ", "a een ", "a een en", "a een en", "a een en"]
    assert states == grown
    assert (found, text) == ("end", "a een en")


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab🦊", max_size=15),
    stop=st.lists(st.text(alphabet="ab🦊", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_first_stop_string_and_only_grows(text: str, stop: list[str]) -> None:
    states, found, final = output_text(stop, text)
    for before, after in zip(states, [*states[1:], final], strict=False):
        assert after.startswith(before)
    if found is None:
        assert final == text
        assert not any(string in text for string in stop)
    else:
        consumed = text.encode()[: len(states)].decode()  # one state a byte
        assert not any(string in consumed[:-1] for string in stop)
        assert final == consumed[: min(consumed.find(string) for string in stop if string in consumed)]
        assert consumed.startswith(final + found)


def test_below_min_tokens_nothing_stops() -> None:
    output = OutputText(Detokenizer(BYTES, True), ["ab"])
    for token, may_stop in zip(b"abab", (False, False, True, True), strict=True):
        found = output.push(token, may_stop=may_stop)
    assert (output.text, found) == ("ab", "ab")


def test_without_a_tokenizer_there_is_no_text() -> None:
    output = OutputText(None, [])
    assert output.push(1, may_stop=True) is None
    output.flush()
    assert output.text == ""


@pytest.mark.parametrize("count", [1, 50])
def test_replacement_characters_without_end(count: int) -> None:
    assert "".join(pieces(BYTES, [0xFF] * count, True)) == "\ufffd" * count


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> RuntimeTokenizer:
    """A tokenizer of words whose texts are cleaned up."""
    cleaned = {"clean_up_tokenization_spaces": True}
    directory = tmp_path_factory.mktemp("words")
    return RuntimeTokenizer(
        tokenizers_of_models.write(directory, tokenizers_of_models.word_piece(), tokenizer_config=cleaned)
    )


LLAMA_2 = PreTrainedTokenizerFast(tokenizer_object=tokenizers_of_models.sentencepiece_like(), bos_token="<s>")
CHUNKS = ["\u2581", "a", "b", "\u2581a", "\u2581b", "<s>", "é", "🦊", "狐"]


def ids_of(chunks: Sequence[str]) -> list[int]:
    """Their tokens; the bytes of what is none."""
    vocabulary = LLAMA_2.get_vocab()
    found = ([vocabulary[c]] if c in vocabulary else [vocabulary[f"<0x{b:02X}>"] for b in c.encode()] for c in chunks)
    return [id_ for ids in found for id_ in ids]


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.lists(st.sampled_from(CHUNKS), max_size=25),
    output=st.lists(st.sampled_from(CHUNKS), max_size=8),
    skip=st.booleans(),
)
@example(prompt=["\u2581a"], output=["\u2581b"], skip=True)
@example(prompt=["<s>"], output=["\u2581b"], skip=True)
@example(prompt=["\u2581a", *["<s>"] * 20], output=["\u2581b"], skip=True)
@example(prompt=["b", *["狐"] * 3], output=["\u2581b"], skip=True)
def test_a_completion_is_what_its_tokens_add_to_the_prompt(prompt: list[str], output: list[str], skip: bool) -> None:
    """As transformers decodes all tokens and those of the prompt."""
    before, after = ids_of(prompt), ids_of(output)
    stream = Detokenizer(LLAMA_2, skip, before)
    text = "".join([*(stream.push(token) for token in after), stream.flush()])
    whole = LLAMA_2.decode(before + after, skip_special_tokens=skip)
    assert LLAMA_2.decode(before, skip_special_tokens=skip) + text == whole


def test_a_character_that_the_prompt_ends_within_belongs_to_the_completion() -> None:
    tokens = list("a🦊b".encode())
    stream = Detokenizer(BYTES, True, tokens[:3])
    assert [stream.push(token) for token in tokens[3:]] == ["", "🦊", "b"]


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from(["a", "b", "ab", ".", "?", "'", "n't", "'s"]), max_size=12))
def test_spaces_that_are_cleaned_up(words: RuntimeTokenizer, text: list[str]) -> None:
    ids = words.encode(" ".join(text))
    output = detokenizer.output_text(words, [])
    for id_ in ids:
        before = output.text
        output.push(id_, may_stop=True)
        assert output.text.startswith(before)
    output.flush()
    assert output.text == words.decode(ids)


def stopped_by(stop: str, tokens: Sequence[int]) -> tuple[str, str | None, int]:
    """The text of bytes and special tokens, what ended it, and after how many tokens."""
    output = OutputText(Detokenizer(BYTES, True), [stop], {toy.BOS: "<bos>", toy.EOS: "<eos>"})
    for number, token in enumerate(tokens, start=1):
        if found := output.push(token, may_stop=True):
            return output.text, found, number
    output.flush()
    return output.text, None, len(tokens)


def test_special_tokens_that_the_text_leaves_out_stop_it() -> None:
    assert stopped_by("<eos>", [*b"ab", toy.EOS, *b"c"]) == ("ab", "<eos>", 3)
    assert stopped_by("b<eos>\n", [*b"ab", toy.EOS, *b"\n"]) == ("a", "b<eos>\n", 4)
    assert stopped_by("b<eos>\n", [*b"ab", toy.EOS, *b"c"]) == ("abc", None, 4)
    assert stopped_by("<eos>", [*b"a", toy.BOS, *b"b"]) == ("ab", None, 3)
    assert stopped_by("ab", [*b"a", toy.EOS, *b"b"]) == ("", "ab", 3)
