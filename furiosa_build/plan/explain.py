"""Why a step is to be done again: how the factors of its key differ from those of an earlier one. Plain data only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_ABSENT = "(absent)"
_DIGEST = re.compile(r"[0-9a-f]{40,64}")


@dataclass(frozen=True)
class Change:
    """One factor that differs. `factor` is a path such as `reads.bucket[1]`; an absent side is None."""

    factor: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.factor}: {_short(self.before)} -> {_short(self.after)}"


@dataclass(frozen=True)
class Explanation:
    """One step.

    Attributes:
        step: Its name.
        state: `up to date`, `to do`, or `waits`: for steps that it needs, since its key depends on what they make.
        reason: One line, empty when it is up to date.
        changes: What differs from the nearest earlier action of the step.
        waits_for: The steps that it waits for.
    """

    step: str
    state: str
    reason: str = ""
    changes: tuple[Change, ...] = ()
    waits_for: tuple[str, ...] = ()


def differences(before: Any, after: Any, at: str = "") -> Iterator[Change]:
    """The leaves that differ between two values made of mappings, sequences and scalars."""
    if before == after and type(before) is type(after):
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(key for key in after if key not in before)]:
            path = f"{at}.{key}" if at else str(key)
            if key not in after:
                yield Change(path, before[key], None)
            elif key not in before:
                yield Change(path, None, after[key])
            else:
                yield from differences(before[key], after[key], path)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differences(one, other, f"{at}[{index}]")
    else:
        yield Change(at, before, after)


def nearest(factors: Mapping[str, Any], earlier: Iterable[Mapping[str, Any]]) -> tuple[Change, ...] | None:
    """What differs from the one that differs least; of equals the first. None when there are none."""
    found = [tuple(differences(one, factors)) for one in earlier]
    return min(found, key=len, default=None)


def _short(value: Any) -> str:
    if value is None:
        return _ABSENT
    if isinstance(value, str):
        return value[:12] if _DIGEST.fullmatch(value) else value
    text = re.sub(r"[0-9a-f]{40,64}", lambda match: match[0][:12], repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
