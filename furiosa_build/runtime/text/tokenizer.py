"""Text to tokens and back, and the chat template; all from the artifact's model/ directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from furiosa_build.core.errors import UserError

Message = Mapping[str, Any]


class Tokenizer:
    """The tokenizer of an artifact.

    Args:
        model_directory: Has tokenizer.json and, if the model chats, tokenizer_config.json and
            chat_template.jinja.

    Raises:
        UserError: A file cannot be read.
    """

    def __init__(self, model_directory: Path) -> None:
        self._directory = model_directory
        path = model_directory / "tokenizer.json"
        try:
            self._fast: FastTokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(f"{path} is not a tokenizer: {error}", where=str(path)) from error
        self._fast.no_truncation()
        self._fast.no_padding()
        self._config = _read_json(model_directory / "tokenizer_config.json")
        self._chat_template: Template | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, by default with those that the tokenizer puts around every text."""
        return list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        return str(self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def to_json(self) -> str:
        """The tokenizer as tokenizer.json holds it."""
        return str(self._fast.to_str())

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation. It has its special tokens in it: encode it without adding any.

        Raises:
            UserError: The artifact has no chat template, or the template rejects the messages.
        """
        if self._chat_template is None:
            self._chat_template = _compile(self._template_source())
        special = {name: _content(value) for name, value in self._config.items() if name.endswith("_token")}
        try:
            return self._chat_template.render(
                {"documents": None} | special | variables,
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program, and fails in as many ways
            raise UserError(f"the chat template rejects the messages: {error}", where="messages") from error

    def _template_source(self) -> str:
        path = self._directory / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str):
            raise UserError(
                "the artifact has no chat template",
                where=str(path),
                hint="use generate() with a prompt that is laid out as the model expects",
            )
        return template


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; for a prompt it has no effect."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> Template:
    """A template as transformers compiles it: the same helpers and white space, in a sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format_: datetime.now().strftime(format_)
    try:
        return environment.from_string(source)
    except (TemplateError, RecursionError) as error:
        raise UserError(f"the artifact's chat template is malformed: {error}", where="chat template") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is invalid JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object", where=str(path))
    return value


def end_of_sequence_ids(model_directory: Path, hf_config: Mapping[str, Any]) -> frozenset[int]:
    """The model's end-of-sequence tokens: generation_config.json says so, else config.json."""
    for config in (_read_json(model_directory / "generation_config.json"), hf_config):
        ids = config.get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, Iterable) else [ids])
    return frozenset()
