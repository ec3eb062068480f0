"""Patterns of a checkpoint's configuration: `re:` and a regular expression for the beginning of a module's name.

A checkpoint comes from anywhere, so the expressions run in RE2, whose time is linear in the name's length.
"""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from typing import Any

PREFIX = "re:"


def problem(pattern: str) -> str:
    """Why a pattern cannot be taken: Python and RE2 do not both read it; empty if they do."""
    import re2

    text = pattern.removeprefix(PREFIX)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of a set that a later Python will read otherwise
            re.compile(text)
    except (re.error, FutureWarning, RecursionError, OverflowError) as error:
        return f"a regular expression; {error}"
    try:
        _compiled(text)
    except re2.error as error:
        return f"a regular expression that RE2 takes: no lookaround, no backreference; {_text(error)}"
    return ""


def matches(pattern: str, module: str) -> bool:
    """Whether a target or an ignored name, which may be a pattern, is for the module of that name."""
    if pattern.startswith(PREFIX):
        return _compiled(pattern.removeprefix(PREFIX)).match(module) is not None
    return pattern == module


@lru_cache(maxsize=1024)
def _compiled(text: str) -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False
    return re2.compile(text, options)


def _text(error: Exception) -> str:
    """RE2's message, which it may give as bytes."""
    [message] = error.args or ("",)
    return message.decode() if isinstance(message, bytes) else str(message)
