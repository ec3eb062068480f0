"""Prompts as callers write them: what a prompt may be, and a refusal in one sentence of what is none."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.text.chat_template import Message
from furiosa_build.runtime.torch_of_caller import is_tensor

if TYPE_CHECKING:
    from torch import Tensor

Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message] | Mapping[str, Any] | NDArray[Any] | Tensor"
"""A text, token ids, the messages of a conversation (dicts with `role` and `content`), or vLLM's dict of one of the
first two: `{"prompt": text}`, `{"prompt_token_ids": ids}`. Ids are a list or another sequence, an array or a tensor."""

VALID = "a text, token ids, a list of messages, or a dict with `prompt` or `prompt_token_ids`"


class WrongTypeError(UserError, TypeError):
    """A value of a type that is not taken."""


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt in the one form that the engine goes on with: tokens, else messages, else a text."""

    text: str | None = None
    tokens: list[int] | None = None
    messages: Sequence[Message] | None = None


def parse_prompt(prompt: object, where: str) -> ParsedPrompt:
    """A prompt in any of its forms.

    Raises:
        WrongTypeError: It is none, or has ids that are not integers.
        UserError: A text that is not valid Unicode; a dict with other entries.
    """
    if isinstance(prompt, str):
        return ParsedPrompt(text=check_text(prompt, where))
    if isinstance(prompt, Mapping):
        return _parse_dict(prompt, where)
    if is_conversation(prompt):
        return ParsedPrompt(messages=check_messages(prompt, where))
    return ParsedPrompt(tokens=_token_ids(prompt, where))


def list_prompts(prompts: object) -> list[Prompt]:
    """The prompts in one prompt or a list of them; a matrix has one in each row. Raises WrongTypeError."""
    if (isinstance(prompts, np.ndarray) or is_tensor(prompts)) and prompts.ndim != 1:
        prompts = list(prompts) if prompts.ndim == 2 else prompts
    elif isinstance(prompts, np.ndarray) and prompts.dtype.kind in "OU":  # texts, for one
        prompts = prompts.tolist()
    if isinstance(prompts, (str, Mapping)) or is_conversation(prompts) or not _is_list(prompts):
        parse_prompt(prompts, "prompts")
        return [cast(Prompt, prompts)]
    listed = list(prompts)
    return [cast(Prompt, listed)] if listed and _is_scalar(listed[0]) else listed


def is_conversation(prompt: object) -> TypeGuard[Sequence[Message]]:
    """Whether a prompt is a list of messages, and no text or list of tokens."""
    return _is_list(prompt) and bool(prompt) and isinstance(prompt[0], Mapping) and "role" in prompt[0]


def check_messages(messages: object, where: str) -> Sequence[Message]:
    """The messages of a conversation, those whose content is a list of texts with one text. Raises UserError."""
    if not _is_list(messages):
        raise WrongTypeError(f"{_name(messages)} is not a conversation", where=where, valid="a list of messages")
    if not messages:
        raise UserError("a conversation has no messages", where=where, valid="one or more")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            what = f"{_shown(message)} is not a message"
            raise WrongTypeError(what, where=where, valid="dicts with `role` and `content`")
    return [_with_text(message, where) for message in messages]


def check_text(text: str, where: str) -> str:
    """The text. Raises UserError if it is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"the text is not valid Unicode: {text[error.start]!r} at character {error.start} is half of a pair"
        raise UserError(what, where=where, hint="decode bytes as UTF-8 with errors='replace'") from error
    return text


def truncate(tokens: list[int], number: int | None, longest: int) -> list[int]:
    """The last `number` tokens of a prompt: of -1 the `longest` that can be run, of None all."""
    return tokens if number is None else tokens[-(longest if number == -1 else number) :]


def _parse_dict(prompt: Mapping[Any, Any], where: str) -> ParsedPrompt:
    given = {key: value for key, value in prompt.items() if value is not None}
    if unknown := sorted(map(str, given.keys() - {"prompt", "prompt_token_ids"})):
        raise UserError(f"a prompt does not take `{unknown[0]}`", where=where, valid=VALID)
    text = given.get("prompt")
    if not given or not isinstance(text, str | None):
        raise WrongTypeError(f"{_shown(prompt)} is not a prompt", where=where, valid=VALID)
    if "prompt_token_ids" not in given:
        return ParsedPrompt(text=check_text(text or "", where))
    return ParsedPrompt(text=text, tokens=_token_ids(given["prompt_token_ids"], where))


def _token_ids(ids: object, where: str) -> list[int]:
    if isinstance(ids, np.ndarray) or is_tensor(ids):
        if ids.ndim != 1 or not _has_integers(ids):
            what = f"an array of {ids.dtype} {list(ids.shape)} does not hold token ids"
            raise WrongTypeError(what, where=where, valid="integers in one dimension")
        return cast(list[int], ids.tolist())
    if not _is_list(ids):
        raise WrongTypeError(f"{_name(ids)} is not a prompt", where=where, valid=VALID)
    return [each if type(each) is int else _token_id(each, where) for each in ids]


def _token_id(value: object, where: str) -> int:
    if _is_scalar(value) and not isinstance(value, (bool, np.bool_)):
        try:
            return operator.index(cast(Any, value))
        except TypeError:
            pass
    raise WrongTypeError(f"{_shown(value)} is not a token id", where=where, valid="integers")


def _has_integers(values: NDArray[Any] | Tensor) -> bool:
    if isinstance(values, np.ndarray):
        return values.dtype.kind in "iu"
    return not (values.is_floating_point() or values.is_complex() or str(values.dtype) == "torch.bool")


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _is_scalar(value: object) -> bool:
    return isinstance(value, (int, float, np.generic)) or (is_tensor(value) and value.ndim == 0)


def _with_text(message: Message, where: str) -> Message:
    content = message.get("content")
    if not _is_list(content):
        return message
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            what = f"{_shown(part)} is not supported in a message"
            raise UserError(what, where=where, valid='texts: {"type": "text", "text": ...}')
    return {**message, "content": "".join(part["text"] for part in content)}


def _name(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
