"""The tokenizer that an artifact gets does what the source's does in transformers."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers_of_models import (
    CHATML,
    NAMED,
    SPECIALS,
    TEXTS,
    byte_level,
    letters,
    sentencepiece_like,
    word_piece,
    write,
)
from transformers import AutoTokenizer

from furiosa_build.core.errors import UserError
from furiosa_build.models import tokenizer as made
from furiosa_build.runtime.text.tokenizer import Tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße & 狐"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "reasoning": "hm"},
    {"role": "user", "content": "Why?"},
]
TOOLS = [{"type": "function", "function": {"name": "fé", "parameters": {"b": 1, "a": [True, None]}}}]
LLAMA, FAST = {"model_type": "llama"}, "PreTrainedTokenizerFast"
NEW = {
    "content": "<|new|>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
}
WITH_TOKENS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if pad_token is defined %}pad{% endif %}{% if add_bos_token %}never{% endif %}"
)


def of(**config: Any) -> dict[str, Any]:
    return {"tokenizer_class": FAST, **NAMED, **config}


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def listed(*tokens: dict[str, Any]) -> dict[str, Any]:
    known = {str(256 + n): {**NEW, "content": token} for n, token in enumerate(SPECIALS)}
    return {**known, **{str(256 + len(SPECIALS) + n): token for n, token in enumerate(tokens)}}


def only_vocabulary(directory: Path) -> None:
    write(directory, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"}, vocab={**letters(), "<|endoftext|>": 256})
    (directory / "merges.txt").write_text("#version: 0.2\n")


SOURCES: dict[str, Callable[[Path], Any]] = {
    "tokenizer.json alone": lambda d: write(d, byte_level()),
    "a template in its file": lambda d: write(d, byte_level(), tokenizer_config=of(), chat_template=CHATML),
    "a template in the config": lambda d: write(d, byte_level(), tokenizer_config=of(chat_template=WITH_TOKENS)),
    "named templates in the config": lambda d: write(
        d,
        byte_level(),
        tokenizer_config=of(
            chat_template=[
                {"name": "default", "template": WITH_TOKENS},
                {"name": "tool_use", "template": "TOOLS {{ tools | tojson }}" + WITH_TOKENS},
            ]
        ),
    ),
    "named templates in files": lambda d: write(
        d, byte_level(), tokenizer_config=of(), chat_template=CHATML, tool_use="TOOLS {{ tools | tojson }}", rag="rag"
    ),
    "only tool_use": lambda d: write(
        d, byte_level(), tokenizer_config=of(chat_template=[{"name": "tool_use", "template": "{{ tools | tojson }}"}])
    ),
    "special_tokens_map.json": lambda d: write(
        d,
        byte_level(),
        tokenizer_config=without(of(), "bos_token", "eos_token"),
        special_tokens_map={"bos_token": "<s>", "eos_token": {**without(NEW, "special"), "content": "</s>"}},
        chat_template=WITH_TOKENS,
    ),
    "bos_token null, eos_token with its flags": lambda d: write(
        d,
        byte_level(),
        tokenizer_config=of(bos_token=None, eos_token={"__type": "AddedToken", **NEW, "content": "</s>"}),
        chat_template=WITH_TOKENS,
    ),
    "no pad_token, add_bos_token": lambda d: write(
        d, byte_level(), tokenizer_config=without(of(add_bos_token=True), "pad_token"), chat_template=WITH_TOKENS
    ),
    "extra special tokens by name": lambda d: write(
        d,
        byte_level(),
        tokenizer_config=of(extra_special_tokens={"image_token": "<|new|>", "boi": "<pad>"}),
        chat_template="{{ image_token }}{{ boi }}" + WITH_TOKENS,
    ),
    "another named token": lambda d: write(
        d, byte_level(), tokenizer_config=of(image_token="<|new|>"), chat_template="{{ image_token }}" + WITH_TOKENS
    ),
    "a token in added_tokens_decoder only": lambda d: write(
        d, byte_level(), tokenizer_config=of(added_tokens_decoder=listed(NEW))
    ),
    "a token that is made special": lambda d: write(
        d,
        byte_level(["<tool_call>", "<|new|>"], special=False),
        tokenizer_config={"added_tokens_decoder": {"256": {**NEW, "content": "<tool_call>"}}},
    ),
    "a token in added_tokens.json only": lambda d: write(
        d, byte_level(), tokenizer_config=of(), added_tokens={"<|new|>": 256 + len(SPECIALS)}
    ),
    "additional_special_tokens": lambda d: write(
        d, byte_level(), tokenizer_config=of(additional_special_tokens=["<|new|>", "<tool_call>"])
    ),
    "vocab.json and merges.txt": only_vocabulary,
    "SentencePiece, as transformers rebuilds it": lambda d: write(
        d,
        sentencepiece_like(),
        tokenizer_config={"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": True},
    ),
    "SentencePiece, as it stands": lambda d: write(d, sentencepiece_like(), tokenizer_config={"tokenizer_class": FAST}),
    "words, cleaned up": lambda d: write(
        d, word_piece(), tokenizer_config={"tokenizer_class": FAST, "clean_up_tokenization_spaces": True}
    ),
    "bytes, not cleaned up": lambda d: write(d, byte_level(), tokenizer_config=of(clean_up_tokenization_spaces=True)),
    "special tokens of a text are split": lambda d: write(
        d, byte_level(), tokenizer_config=of(split_special_tokens=True)
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_artifacts_tokenizer_is_that_of_transformers(tmp_path: Path, name: str) -> None:
    source, copy, artifact = (tmp_path / part for part in ("source", "copy", "artifact"))
    SOURCES[name](source)
    shutil.copytree(source, copy)
    artifact.mkdir()
    made.write(made.load(copy, "test", LLAMA), artifact)
    (source / "config.json").write_text(json.dumps(LLAMA))
    theirs, ours = AutoTokenizer.from_pretrained(source), Tokenizer(artifact)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    if theirs.chat_template is not None:
        for tools in (TOOLS, *((None,) if name != "only tool_use" else ())):
            options = {"tools": tools, "add_generation_prompt": True}
            rendered = theirs.apply_chat_template(MESSAGES, tokenize=False, **options)
            assert ours.apply_chat_template(MESSAGES, **options) == rendered
    if not name.startswith("SentencePiece, as transformers") and (source / "tokenizer.json").is_file():
        # So does the runtime with a directory that no build has written, unless transformers rebuilds the tokenizer.
        for text in TEXTS:
            assert Tokenizer(source).encode(text) == theirs(text)["input_ids"]
    # transformers reads the artifact's files as it reads the source's.
    shutil.copy(source / "config.json", artifact)
    again = AutoTokenizer.from_pretrained(artifact)
    assert again.get_vocab() == theirs.get_vocab()
    assert (again.special_tokens_map, again.chat_template) == (theirs.special_tokens_map, theirs.chat_template)


def test_a_file_of_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    pieces += [(piece, 1) for piece in ("\u2581t", "he", "\u2581the", "\u2581a", "at", "\u2581", *"abcdehlot.")]
    for number, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(number), type=kind)
    trained, normalizer = model.trainer_spec, model.normalizer_spec
    trained.model_type, trained.byte_fallback, trained.vocab_size = 2, True, len(pieces)
    trained.unk_id, trained.bos_id, trained.eos_id = 0, 1, 2
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", True, False
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    source, artifact = write(tmp_path / "source", tokenizer_config=config), tmp_path / "artifact"
    artifact.mkdir()
    (source / "tokenizer.model").write_bytes(model.SerializeToString())
    made.write(made.load(source, "test", LLAMA), artifact)
    ours = Tokenizer(artifact)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    for text in ("hello the cat.", "the  bat", "a \u72d0 \U0001f98a"):
        assert ours.encode(text) == [1, *reference.EncodeAsIds(text)]
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model"])
def test_a_file_of_tiktoken(name: str, tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    merged = (b"th", b"the", b" the", b"he", b"at", b" t", b" a")
    ranks = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *merged])}
    # The pattern that transformers gives such a tokenizer: cl100k's.
    words = (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"""
        r"""|\s+(?!\S)|\s+"""
    )
    reference = tiktoken.Encoding("test", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    source, artifact = write(tmp_path / "source", tokenizer_config={"tokenizer_class": FAST}), tmp_path / "artifact"
    artifact.mkdir()
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (source / name).write_text("".join(lines))
    made.write(made.load(source, "test", LLAMA), artifact)
    ours = Tokenizer(artifact)
    for text in ("hello the cat.", "the  bat 123456", "a \u72d0 \U0001f98a\n\n x"):
        assert ours.encode(text) == reference.encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_the_files_are_the_same_each_time(tmp_path: Path) -> None:
    written = []
    for number in range(2):
        source = write(tmp_path / f"source{number}", byte_level(), tokenizer_config=of(), chat_template=CHATML, rag="x")
        artifact = tmp_path / f"artifact{number}"
        artifact.mkdir()
        made.write(made.load(source, "test", LLAMA), artifact)
        written.append({path.name: path.read_bytes() for path in artifact.rglob("*") if path.is_file()})
    assert written[0] == written[1]
    assert set(written[0]) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "rag.jinja"}


def test_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = made.load(write(tmp_path, byte_level()), "test", LLAMA)
    assert made.ids_beyond(tokenizer, 259) == {"<|im_start|>": 259, "<|im_end|>": 260}
    assert made.ids_beyond(tokenizer, 261) == {}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"tokenizer_config": {"tokenizer_class": "CTRLTokenizer", "unk_token": "a"}, "vocab": {"a": 0}},
            "runs the tokenizer of test, CTRLTokenizer, in Python",
        ),
        (
            {"tokenizer_config": {"auto_map": {"AutoTokenizer": ["tokens.OurTokenizer", None]}}},
            "code of the model's own, which is never executed",
        ),
        ({"vocab": {"a": [0]}}, "cannot load the tokenizer of test"),
    ],
)
def test_what_is_refused(tmp_path: Path, files: dict[str, Any], words: str) -> None:
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=words) as refused:
        made.load(write(tmp_path, **files), "test", {"model_type": "unknown"})
    assert "model.tokenizer=none" in str(refused.value)


def test_a_template_cannot_be_written_elsewhere(tmp_path: Path) -> None:
    named = [{"name": "../default", "template": "x"}]
    tokenizer = made.load(write(tmp_path, byte_level(), tokenizer_config=of(chat_template=named)), "test", LLAMA)
    with pytest.raises(UserError, match="is not a name for a chat template"):
        made.write(tokenizer, tmp_path)
