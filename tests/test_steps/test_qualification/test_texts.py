"""Tokenizers and chat templates that are spoiled, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from furiosa_build.runtime.probe import Chat, Questions, text_answers
from furiosa_build.runtime.text.tokenizer import Tokenizer as RuntimeTokenizer
from furiosa_build.steps.qualification.original import Original, OriginalTokenizer
from furiosa_build.steps.qualification.samples import AROUND, CHATS, TEXTS
from furiosa_build.steps.qualification.texts import differences

SPECIAL = ["<s>", "</s>", "<|user|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)
QUESTIONS = Questions(
    texts=[*TEXTS, *(form.format(token, token) for token in SPECIAL for form in AROUND)],
    tokens=[list(range(40, 80)), [256, 72, 105, 258, 257], [0xF0, 0x9F]],
    chats=[Chat.model_validate(chat) for chat in CHATS],
)


def write(directory: Path, change: Callable[[Tokenizer, dict[str, Any]], None] | None = None) -> Path:
    """A model's directory with a tokenizer of bytes, after `change`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config["chat_template"] = TEMPLATE
    if change is not None:
        change(tokenizer, config)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def theirs(tmp_path: Path) -> OriginalTokenizer:
    source = write(tmp_path / "source")
    found = Original({path.name: path for path in source.iterdir()}, tmp_path / "links").tokenizer()
    assert found is not None
    return found


def found(theirs: OriginalTokenizer, artifact: Path) -> list[str]:
    return differences(QUESTIONS, text_answers(RuntimeTokenizer(artifact), QUESTIONS), theirs)


def test_the_same_tokenizer_has_no_differences(theirs: OriginalTokenizer, tmp_path: Path) -> None:
    assert found(theirs, write(tmp_path / "artifact")) == []


def test_special_tokens_that_are_lost(theirs: OriginalTokenizer, tmp_path: Path) -> None:
    def lose(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
        del config
        data = json.loads(tokenizer.to_str())
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "<|user|>"]
        tokenizer.__setstate__(json.dumps(data).encode())

    encoding, decoding = found(theirs, write(tmp_path / "artifact", lose))
    assert encoding.startswith("24 of 84 texts become other tokens than by transformers")
    assert "such as '<|user|>' with special tokens: token 0 is 27 ('<'), by transformers 258 ('<|user|>')" in encoding
    assert "look at the source's tokenizer.json" in encoding
    assert "become other texts than by transformers, such as [256, 72, 105, 258, 257] with special tokens" in decoding


def test_tokens_that_are_no_longer_special(theirs: OriginalTokenizer, tmp_path: Path) -> None:
    def demote(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
        del config
        tokenizer.__setstate__(tokenizer.to_str().replace('"special":true', '"special":false').encode())

    [decoding] = found(theirs, write(tmp_path / "artifact", demote))
    assert "such as [256, 72, 105, 258, 257] without special tokens: '<s>" in decoding


def test_a_token_before_every_text(theirs: OriginalTokenizer, tmp_path: Path) -> None:
    def begin(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
        del config
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])

    [encoding] = found(theirs, write(tmp_path / "artifact", begin))
    assert "with special tokens: token 0 is 256 ('<s>'), by transformers" in encoding


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE.replace("<|end|>", ""), "user: from character "),
        (TEMPLATE.replace("{% if tools %}", "{% if false %}"), "user with tools: from character 3 on"),
        (TEMPLATE.replace("bos_token", "no_such_token"), "user: from character 1 on '|user|>"),
        (
            TEMPLATE + "{{ raise_exception('no') }}",
            "user: the artifact refuses it or has no template, transformers ren",
        ),
        (None, "user: the artifact refuses it or has no template, transformers renders it"),
    ],
    ids=["a word", "tools", "a named token", "refused", "none"],
)
def test_a_template_that_differs(
    template: str | None, expected: str, theirs: OriginalTokenizer, tmp_path: Path
) -> None:
    def change(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
        del tokenizer
        config["chat_template"] = template

    [chats] = found(theirs, write(tmp_path / "artifact", change))
    assert expected in chats
    assert "conversations become other prompts than by transformers" in chats
    assert "look at the source's chat_template.jinja" in chats


def test_a_tokenizer_that_is_missing(theirs: OriginalTokenizer) -> None:
    told = text_answers(None, QUESTIONS)
    assert differences(QUESTIONS, told, theirs) == ["the source has a tokenizer, and the artifact has none"]
