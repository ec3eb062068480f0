"""Why a step is to be done again: how the factors of its key differ from those of an earlier one. Plain data only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

FactorPath = tuple[str | int, ...]
"""The path of a factor among the factors of a key, such as ("reads", "bucket", 1)."""

ABSENT = "(absent)"
UNKNOWN = "(not known yet)"

_DIGEST = re.compile(r"[0-9a-f]{40,64}")
_LONGEST = 60
"""Characters of a value, when people read it."""


@dataclass(frozen=True)
class Change:
    """One factor that differs. `before` or `after` is ABSENT where there is none, `after` UNKNOWN where that is."""

    place: FactorPath
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{_name(self.place)} {self.how}"

    @property
    def how(self) -> str:
        """Such as `changed: int8 -> fp8`."""
        if self.before == ABSENT:
            return f"is new: {_short(self.after)}"
        if self.after == ABSENT:
            return f"is gone: {_short(self.before)}"
        if isinstance(self.before, list) and isinstance(self.after, list):
            return f"changed: {_lists(self.before, self.after)}"
        return f"changed: {_short(self.before)} -> {_short(self.after)}"


@dataclass(frozen=True)
class Explanation:
    """One step.

    Attributes:
        step: Its name.
        state: `to publish`: what it makes is in the store, and not in the output directory. `waits`: it is up to date
            if what it waits for is the same as it was.
        reason: One line, empty when it is up to date.
        changes: What differs from the nearest earlier action of the step.
        waits_for: What its key depends on and is not known yet: what these steps make; for `fetch`, these files.
    """

    step: str
    state: Literal["up to date", "to publish", "to do", "waits"]
    reason: str = ""
    changes: tuple[Change, ...] = ()
    waits_for: tuple[str, ...] = ()


def explain_step(
    step: str, factors: Mapping[str, Any], missing: Sequence[FactorPath], earlier: Iterable[Mapping[str, Any]]
) -> Explanation:
    """Why the store has no action for a step.

    Args:
        step: Its name.
        factors: Of its key, as far as they are known.
        missing: Where in them something will stand that is not known yet.
        earlier: Factors of the actions of this step that the store knows of.
    """
    waits_for = tuple(str(path[-1]) for path in missing)
    changes = nearest(factors, missing, earlier)
    if changes is None:
        return Explanation(step, "to do", "never done", waits_for=waits_for)
    if changes:
        return Explanation(step, "to do", "changed since it was done", changes, waits_for)
    if not missing:
        return Explanation(step, "to do", "it was done, and what it made is damaged or gone from the store")
    when = "once read, that is" if missing[0][1] == "source" else "that makes"
    return Explanation(step, "waits", f"up to date if {when} the same as before", waits_for=waits_for)


def nearest(
    factors: Mapping[str, Any], missing: Sequence[FactorPath], earlier: Iterable[Mapping[str, Any]]
) -> tuple[Change, ...] | None:
    """The changes since the earlier action that differs least; of equals the first. None when there is none."""
    found = [tuple(differences(before, _with_missing(factors, missing, before))) for before in earlier]
    return min(found, key=len, default=None)


def differences(before: Any, after: Any, at: FactorPath = ()) -> Iterator[Change]:
    """The leaves that differ between two values made of mappings, lists and scalars.

    Lists of one length are compared element by element; of others the whole list is the leaf.
    """
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(key for key in after if key not in before)]:
            if key in before and key in after:
                yield from differences(before[key], after[key], (*at, key))
            else:
                yield Change((*at, key), before.get(key, ABSENT), after.get(key, ABSENT))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differences(one, other, (*at, index))
    elif before != after or type(before) is not type(after):
        yield Change(at, before, after)


def _with_missing(
    factors: Mapping[str, Any], missing: Sequence[FactorPath], before: Mapping[str, Any]
) -> dict[str, Any]:
    """The factors, with those that are not known yet as they were before."""
    assumed = dict(factors)
    for path in missing:
        old: Any = before
        new = assumed
        for key in path[:-1]:
            old = old.get(key, {}) if isinstance(old, Mapping) else {}
            new[str(key)] = new = dict(new.get(str(key), {}))
        new[str(path[-1])] = old.get(path[-1], UNKNOWN) if isinstance(old, Mapping) else UNKNOWN
    return assumed


def lines(changes: Iterable[Change]) -> list[str]:
    """The changes as a person reads them. Entries of one mapping that changed in the same way are one line."""
    alike: dict[tuple[FactorPath, str], list[Change]] = {}
    for change in changes:
        alike.setdefault((change.place[:-1], change.how), []).append(change)
    return [
        str(group[0]) if len(group) == 1 else f"{_name(path)}: {len(group)} entries, each {how}, {_examples(group)}"
        for (path, how), group in alike.items()
    ]


def _examples(group: list[Change]) -> str:
    names = [str(change.place[-1]) for change in group]
    return f"such as {names[0]}" if len(names) > 2 else " and ".join(names)


def _name(path: FactorPath) -> str:
    """What a person calls a factor, such as `model.safetensors` or `source furiosa_build.steps.trace`."""
    match path:
        case ("inputs", "source", file):
            return str(file)
        case ("inputs", step, file):
            return f"{file} of {step}"
        case ("inputs", step):
            return f"input from {step}"
        case ("source", module):
            return f"source {module}"
        case ("reads" | "tools", *rest) if rest:
            return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in rest).removeprefix(".")
    return ".".join(map(str, path))


def _lists(before: list[Any], after: list[Any]) -> str:
    """What was taken out of a list, and what was put in; both lists where only the order differs."""
    gone = [value for value in before if value not in after]
    come = [value for value in after if value not in before]
    parts = [*(f"without {_short(value)}" for value in gone), *(f"with {_short(value)}" for value in come)]
    return ", ".join(parts[:4] + ["..."] * (len(parts) > 4)) or f"{_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    """Digests by their first 12 digits, long values cut."""
    text = _DIGEST.sub(lambda match: match[0][:12], value if isinstance(value, str) else repr(value))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
