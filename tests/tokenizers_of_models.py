"""Directories with a tokenizer's files, in the forms in which models have them."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIALS = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEXTS = (
    "Hello, world! It's 2026.",
    " leading space",
    "two  spaces\nand\ttabs ",
    "naïve café 狐 🦊 👩‍👩‍👧",
    "def f(x):\n    return x ** 2",
    "<s>a</s> <|im_start|>user",
    "a<|new|>b <tool_call>c",
    "can ' t . stop n't ?",
    "",
)


def letters() -> dict[str, int]:
    """The vocabulary of bytes that byte-level tokenizers begin with: GPT-2's letters, in the order of their bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return {chr(byte if byte in shown else next(others)): byte for byte in range(256)}


def byte_level(specials: Sequence[str] = SPECIALS, special: bool = True) -> Tokenizer:
    """A byte a token, without merges."""
    tokenizer = Tokenizer(models.BPE(vocab=letters(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(each, special=special, normalized=False) for each in specials])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As of Llama 2: words begin with U+2581, the first space is dropped, unknown characters fall back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [*("\u2581" + letter for letter in string.ascii_lowercase), *string.ascii_lowercase]
    merges = [("\u2581", letter) for letter in string.ascii_lowercase]
    vocabulary = {piece: id_ for id_, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in ("<unk>", "<s>", "</s>")])
    return tokenizer


def word_piece() -> Tokenizer:
    """As of BERT: words apart, with their continuations after `##`."""
    pieces = ["[UNK]", "[CLS]", "[SEP]", *string.printable.split()[0], *(f"##{c}" for c in string.ascii_lowercase)]
    tokenizer = Tokenizer(models.WordPiece({piece: id_ for id_, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return tokenizer


def write(directory: Path, tokenizer: Tokenizer | None = None, **files: Any) -> Path:
    """A tokenizer's directory: tokenizer.json, and `files` by their names without suffix.

    A text is a template in Jinja, a mapping JSON.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        if isinstance(content, Mapping):
            (directory / f"{name}.json").write_text(json.dumps(content))
        else:
            path = directory / (
                f"{name}.jinja" if name == "chat_template" else f"additional_chat_templates/{name}.jinja"
            )
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
    return directory
