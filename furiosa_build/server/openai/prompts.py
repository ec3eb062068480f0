"""Texts and conversations to token ids and back. In another thread, as long ones take long."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from furiosa_build.runtime.text.tokenizer import Tokenizer
from furiosa_build.server.http.errors import bad_request
from furiosa_build.server.openai.messages import Message, TemplateOptions


async def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text. Raises ApiError for one that is not valid Unicode."""
    return await asyncio.to_thread(_encode, tokenizer, text, add_special_tokens)


async def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    options: TemplateOptions,
    tools: list[dict[str, Any]] | None = None,
    add_special_tokens: bool = False,
) -> tuple[str, list[int]]:
    """The prompt of a conversation, as text and as token ids.

    Raises:
        ApiError: The artifact's chat template does not support tools.
        UserError: The artifact has no chat template, or it rejects the messages.
    """
    turns = [message.for_template() for message in messages]

    def apply_template() -> tuple[str, list[int]]:
        text = lay_out(tokenizer, turns, options, tools)
        if tools and tokenizer.chat_templates.ignores_tools(turns, tools, **_rendering(options)):
            raise bad_request("the artifact's chat template does not support tools", "tools")
        return text, _encode(tokenizer, text, add_special_tokens)

    return await asyncio.to_thread(apply_template)


def lay_out(
    tokenizer: Tokenizer,
    turns: Sequence[dict[str, Any]],
    options: TemplateOptions,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The prompt of a conversation, as text. Raises as `render`."""
    return tokenizer.apply_chat_template(turns, tools=tools, **_rendering(options))


def _rendering(options: TemplateOptions) -> dict[str, Any]:
    return {"continue_final_message": options.continue_final_message, **options.template_variables()}


async def decode(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of token ids."""
    return await asyncio.to_thread(tokenizer.decode, ids, skip_special_tokens)


async def as_text(tokenizer: Tokenizer, prompt: str | Sequence[int], skip_special_tokens: bool = True) -> str:
    """A prompt as text, where an answer repeats it. A character that it ends within belongs to the answer."""
    if isinstance(prompt, str):
        return prompt
    return (await decode(tokenizer, prompt, skip_special_tokens)).rstrip("\N{REPLACEMENT CHARACTER}")


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad_request(f"the prompt is not valid Unicode: {error.reason}", "prompt") from error
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)
