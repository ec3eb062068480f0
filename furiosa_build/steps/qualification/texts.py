"""Compares an artifact's tokenizer and chat template with the source's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from furiosa_build.runtime.probe import Chat, Questions
from furiosa_build.steps.qualification.original import OriginalTokenizer

_TOKENIZER = "look at the source's tokenizer.json, tokenizer_config.json, special_tokens_map.json and added_tokens.json"
_TEMPLATE = "look at the source's chat_template.jinja, additional_chat_templates/ and tokenizer_config.json"


def differences(asked: Questions, told: dict[str, Any], tokenizer: OriginalTokenizer | None) -> list[str]:
    """What differs, in words; empty: nothing does.

    Args:
        asked: The questions.
        told: The artifact's answers, as `runtime.probe` gives them.
        tokenizer: The source's tokenizer, if it has one.
    """
    if tokenizer is None:
        return []
    if told["texts"] is None:
        return ["the source has a tokenizer, and the artifact has none"]
    found = (kind(asked, told, tokenizer) for kind in (_of_encoding, _of_decoding, _of_chats))
    return [text for text in found if text]


def _of_encoding(asked: Questions, told: dict[str, Any], tokenizer: OriginalTokenizer) -> str:
    cases = [(text, special) for text in asked.texts for special in (True, False)]
    ours = [tokens for both in told["texts"] for tokens in both]
    theirs = [tokenizer.encode(*case) for case in cases]
    wrong = [case for case in zip(cases, ours, theirs, strict=True) if case[1] != case[2]]
    if not wrong:
        return ""
    (text, special), got, right = wrong[0]
    at, ours_there, theirs_there = _first_difference(got, right)
    names = [
        "nothing more" if token is None else f"{token} ({tokenizer.piece(token)!r})"
        for token in (ours_there, theirs_there)
    ]
    how = "with" if special else "without"
    return (
        f"{len(wrong)} of {len(cases)} texts become other tokens than by transformers, such as {text!r} {how} special "
        f"tokens: token {at} is {names[0]}, by transformers {names[1]}; {_TOKENIZER}"
    )


def _of_decoding(asked: Questions, told: dict[str, Any], tokenizer: OriginalTokenizer) -> str:
    cases = [(tokens, skip) for tokens in asked.tokens for skip in (True, False)]
    ours = [text for both in told["tokens"] for text in both]
    theirs = [tokenizer.decode(*case) for case in cases]
    wrong = [case for case in zip(cases, ours, theirs, strict=True) if case[1] != case[2]]
    if not wrong:
        return ""
    (tokens, skip), got, right = wrong[0]
    how = "without" if skip else "with"
    return (
        f"{len(wrong)} of {len(cases)} sequences of tokens become other texts than by transformers, such as "
        f"{_excerpt(tokens)} {how} special tokens: {got!r}, by transformers {right!r}; {_TOKENIZER}"
    )


def _of_chats(asked: Questions, told: dict[str, Any], tokenizer: OriginalTokenizer) -> str:
    theirs = [tokenizer.render(chat) for chat in asked.chats]
    cases = zip(asked.chats, told["chats"], theirs, strict=True)
    wrong = [case for case in cases if case[1] != case[2]]
    if not wrong:
        return ""
    chat, got, right = wrong[0]
    what = f"{len(wrong)} of {len(asked.chats)} conversations become other prompts than by transformers, such as "
    what += f"{_described(chat)}: "
    if got is None or right is None:
        what += f"the artifact {_whether(got)}, transformers {_whether(right)}"
    else:
        at, *_ = _first_difference(got, right)
        what += f"from character {at} on {got[at : at + 60]!r}, by transformers {right[at : at + 60]!r}"
    return f"{what}; {_TEMPLATE}"


def _whether(rendered: str | None) -> str:
    return "refuses it or has no template" if rendered is None else "renders it"


def _described(chat: Chat) -> str:
    """`system, user, assistant with tools, without generation prompt`."""
    roles = ", ".join(str(message["role"]) for message in chat.messages)
    prompt = "" if chat.add_generation_prompt else ", without generation prompt"
    return f"{roles}{' with tools' if chat.tools else ''}{prompt}"


def _first_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[int, Any, Any]:
    """Where two sequences differ first, and what each has there; None: nothing more."""
    pairs = enumerate(zip_longest(ours, theirs))
    return next((at, mine, other) for at, (mine, other) in pairs if mine != other)


def _excerpt(tokens: Sequence[int], most: int = 12) -> str:
    return f"[{', '.join(map(str, tokens[:most]))}{', ...' if tokens[most:] else ''}]"
