"""The tokenizer's files and the chat template, the latter against transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.text.tokenizer import Tokenizer, end_of_sequence_ids

from . import toy

MESSAGES = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "Grüße & 狐"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]
TOOLS = [{"type": "function", "function": {"name": "fé", "parameters": {"b": 1, "a": [True, None]}}}]

TEMPLATES = {
    "white space": """
{%- for message in messages %}
    {{- bos_token if loop.first }}
    <|{{ message['role'] }}|>
{{ message.content | trim }}{{ eos_token }}
{% endfor %}
    {%- if add_generation_prompt %}
        <|assistant|>
    {% endif %}
""",
    "tools as JSON": "{% for tool in tools %}{{ tool | tojson }}{{ tool | tojson(indent=2) }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation marks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "dict and its fields": "{% set d = dict(a=1, **{'b': 2}) %}{{ d.a }}{{ d['b'] }}{{ dict.fromkeys([1], 2) }}",
    "the year": "{{ strftime_now('%Y') }}",
    "undefined names": "{{ nothing }}{% if documents is none %}no documents{% endif %}",
}
CONFIG = {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "lstrip": False}, "model_max_length": 8}


def directory(path: Path, **files: Any) -> Path:
    """A model directory with the byte tokenizer, and `files` by their names without suffix."""
    toy.byte_tokenizer().save(str(path / "tokenizer.json"))
    for name, content in files.items():
        if isinstance(content, str):
            (path / f"{name}.jinja").write_text(content)
        else:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_templates_render_as_in_transformers(tmp_path: Path, name: str, add_generation_prompt: bool) -> None:
    ours = Tokenizer(directory(tmp_path, tokenizer_config=CONFIG, chat_template=TEMPLATES[name]))
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=toy.byte_tokenizer(), bos_token="<bos>", eos_token="<eos>"
    ).apply_chat_template(
        MESSAGES,
        tools=TOOLS,
        chat_template=TEMPLATES[name],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    rendered = ours.apply_chat_template(MESSAGES, tools=TOOLS, add_generation_prompt=add_generation_prompt)
    assert rendered == theirs
    assert rendered


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": "from the config"},
        {"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": "from the config"}]},
    ],
)
def test_where_the_template_comes_from(tmp_path: Path, config: dict[str, Any]) -> None:
    assert Tokenizer(directory(tmp_path, tokenizer_config=config)).apply_chat_template([]) == "from the config"
    (tmp_path / "chat_template.jinja").write_text("from its file")
    assert Tokenizer(tmp_path).apply_chat_template([]) == "from its file"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{% for %}", "chat template is malformed"),
        ("{{ raise_exception('roles must alternate') }}", "rejects the messages: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "rejects the messages"),
        ("{{ messages.append(1) }}", "rejects the messages: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "rejects the messages: .*unsafe"),
        ("{% include 'other' %}", "rejects the messages"),
        ("{% set ns = namespace(_a=1) %}", "rejects the messages: .*unsafe"),
        ("{% set ns = namespace() %}{% set ns._a = 1 %}", "rejects the messages: .*unsafe"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path: Path, template: str | None, message: str) -> None:
    files = {"chat_template": template} if template else {}
    with pytest.raises(UserError, match=message):
        Tokenizer(directory(tmp_path, **files)).apply_chat_template(MESSAGES)


LINES = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "content"),
    [
        (LINES, "To be"),
        (LINES, "To be "),
        (LINES.replace("m.content", "m.content | trim"), " To be  "),
        (PARTS, [{"type": "text", "text": "To"}, {"type": "text", "text": " be"}]),
    ],
)
def test_the_last_message_is_continued_as_in_transformers(tmp_path: Path, template: str, content: Any) -> None:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    ours = Tokenizer(directory(tmp_path, chat_template=template)).apply_chat_template(messages, **options)
    theirs = PreTrainedTokenizerFast(tokenizer_object=toy.byte_tokenizer()).apply_chat_template(
        messages, chat_template=template, tokenize=False, **options
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        ("x", [{"role": "user", "content": "a"}], "does not write the last message"),
        (LINES, [], "has no text to continue"),
        (LINES, [{"role": "assistant", "content": None}], "has no text to continue"),
    ],
)
def test_what_cannot_be_continued(tmp_path: Path, template: str, messages: Any, words: str) -> None:
    tokenizer = Tokenizer(directory(tmp_path, chat_template=template))
    with pytest.raises(UserError, match=words):
        tokenizer.apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)


def test_whether_tools_are_written(tmp_path: Path) -> None:
    templates = Tokenizer(directory(tmp_path, chat_template=LINES)).chat_templates
    assert templates.ignores_tools(MESSAGES, TOOLS)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    assert not Tokenizer(tmp_path).chat_templates.ignores_tools(MESSAGES, TOOLS)


def test_encode_and_decode(tmp_path: Path) -> None:
    tokenizer = Tokenizer(directory(tmp_path))
    assert tokenizer.encode("é<eos>") == [*"é".encode(), toy.EOS]
    assert tokenizer.decode([104, 105, toy.EOS]) == "hi"
    assert tokenizer.decode([104, 105, toy.EOS], skip_special_tokens=False) == "hi<eos>"


def test_its_directory_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    odd = directory(tmp_path / "plain").rename(tmp_path / os.fsdecode(b"caf\xe9"))
    assert Tokenizer(odd).encode("hi") == list(b"hi")


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    fast = toy.byte_tokenizer()
    fast.enable_truncation(2)
    fast.enable_padding(length=9)
    fast.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode("hello") == list(b"hello")


@pytest.mark.parametrize("content", ["", "{}", '{"model": 1}', "[" * 100_000])
def test_a_damaged_tokenizer_is_one_message(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_damaged_config_is_one_message(tmp_path: Path, content: str) -> None:
    directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer_config\.json is (invalid JSON|not a JSON object)"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("generation_config", "hf_config", "ids"),
    [
        ({"eos_token_id": [1, 2]}, {"eos_token_id": 3}, {1, 2}),
        ({"eos_token_id": 0}, {"eos_token_id": 3}, {0}),
        ({"eos_token_id": None}, {"eos_token_id": 3}, {3}),
        (None, {"eos_token_id": [3]}, {3}),
        (None, {}, set()),
    ],
)
def test_end_of_sequence(tmp_path: Path, generation_config: Any, hf_config: Any, ids: set[int]) -> None:
    if generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    assert end_of_sequence_ids(tmp_path, hf_config) == ids
