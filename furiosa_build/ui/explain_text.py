"""Why each step of a build is to do, as text for a person."""

from __future__ import annotations

from collections.abc import Iterable

from furiosa_build.plan.explain import Explanation
from furiosa_build.plan.explain import lines as change_lines

_MOST_CHANGES = 8
"""How many changes of a step are shown; `--json` has all."""


def explain_text(explanations: Iterable[Explanation]) -> str:
    """Lines that tell for each step whether it is up to date, and if not, why."""
    found = list(explanations)
    width = max(len(one.step) for one in found)
    lines = []
    for one in found:
        awaited = f"for {', '.join(one.waits_for[:2])}{', ...' if one.waits_for[2:] else ''}: "
        why = f"{awaited if one.state == 'waits' else ''}{one.reason}"
        lines.append(f"{one.state:10}  {one.step:{width}}  {why}".rstrip())
        changes = change_lines(one.changes)
        lines += [f"{'':14}{change}" for change in changes[:_MOST_CHANGES]]
        if len(changes) > _MOST_CHANGES:
            lines.append(f"{'':14}and {len(changes) - _MOST_CHANGES} more")
    done = sum(one.state == "up to date" for one in found)
    lines.append(f"{done} of {len(found)} steps are up to date")
    return "\n".join(lines)
