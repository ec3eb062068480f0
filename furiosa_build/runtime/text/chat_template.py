"""Chat templates: a conversation as the text that a model expects, rendered as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from furiosa_build.core.errors import UserError

Message = Mapping[str, Any]

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which a message may have a model's reasoning."""
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplates:
    """The chat templates of a tokenizer.

    Args:
        sources: Their texts, by name: `default`, and others such as `tool_use`.
        tokens: The tokens that templates write by name, such as `bos_token`. One that is not set is undefined.
    """

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str]) -> None:
        self._sources, self._tokens = sources, tokens
        self._compiled: dict[str, Template] = {}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: The turns.
            tools: What the model may call: with tools the template `tool_use` is taken, if there is one.
            documents: What the model may cite.
            add_generation_prompt: The prompt ends with the beginning of the assistant's next turn.
            continue_final_message: The prompt ends within the last message, which the model continues.
            variables: Further variables of the template.

        Raises:
            UserError: There is no template for this, or it rejects the messages.
        """
        if continue_final_message and add_generation_prompt:
            what = "continue_final_message and add_generation_prompt do not go together"
            raise UserError(what, where="continue_final_message", valid="one of the two")
        template = self._template("tool_use" if tools is not None and "tool_use" in self._sources else "default")
        turns = [_turn(message) for message in messages]
        if continue_final_message:
            turns = [*turns[:-1], _tagged(turns)]
        try:
            text = template.render(
                {**self._tokens, **variables},
                messages=turns,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program, and fails in as many ways
            raise UserError(f"the chat template rejects the messages: {error}", where="messages") from error
        return _before_tag(text) if continue_final_message else text

    def ignores_tools(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], **options: Any) -> bool:
        """Whether the template would write the same without the tools."""
        if "tool_use" in self._sources:
            return False
        return self.render(messages, tools=tools, **options) == self.render(messages, tools=None, **options)

    def _template(self, name: str) -> Template:
        if name not in self._sources:
            named = f", only templates for other uses: {', '.join(sorted(self._sources))}" if self._sources else ""
            raise UserError(
                f"the artifact has no chat template{named}",
                where="chat_template.jinja",
                hint="use generate() with a prompt that is laid out as the model expects",
            )
        if name not in self._compiled:
            self._compiled[name] = _compile(self._sources[name])
        return self._compiled[name]


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates get it: without fields that are null, its reasoning under the names that they read."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _tagged(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last turn, whose text is to be continued, with a mark at its end."""
    content = turns[-1].get("content") if turns else None
    if isinstance(content, str):
        return {**turns[-1], "content": content + _TAG}
    parts = list(content) if isinstance(content, list | tuple) else []
    for index, part in reversed(list(enumerate(parts))):
        if isinstance(part, Mapping) and "text" in part:
            parts[index] = {**part, "text": part["text"] + _TAG}
            return {**turns[-1], "content": parts}
    raise UserError("the last message has no text to continue", where="continue_final_message")


def _before_tag(text: str) -> str:
    position = text.rfind(_TAG.strip())
    if position < 0:
        what = "the chat template does not write the last message, so it cannot be continued"
        raise UserError(what, where="continue_final_message")
    # A template that trims a message trims the mark's last space too.
    return text[:position] if text.startswith(_TAG, position) else text[:position].rstrip()


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; for a prompt it has no effect."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict` in a template, without the attributes of Python's."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace` in a template; it refuses names with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"access to attribute {name!r} of a namespace is unsafe")


def _compile(source: str) -> Template:
    """A template as transformers compiles it: the same helpers and white space, in a sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda format_: datetime.now().strftime(format_),
        dict=_Dict(),
        namespace=_Namespace,
    )
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
