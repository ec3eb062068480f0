"""A sweep as text: its points and steps before it runs, what has become of them after."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from furiosa_build.core.text import duration_text, size_text, steps_text

if TYPE_CHECKING:
    from furiosa_build.build.sweep import Sweep
    from furiosa_build.build.sweep_results import PointResult


def sweep_plan_text(sweep: Sweep) -> str:
    """The points, the steps with the points that need them, and what is to do."""
    to_do = [name for name in sweep.steps if not sweep.is_done(name)]
    undone = set(to_do)
    width = max(map(len, sweep.steps))
    lines = [
        f"recipe {sweep.name}: {len(sweep.points)} points",
        *(f"  {number:3}  {point.title}" for number, point in enumerate(sweep.points)),
        "steps, and the points that need them",
    ]
    for name, step in sweep.steps.items():
        points = "all" if len(step.points) == len(sweep.points) else ", ".join(map(str, step.points))
        lines.append(f"  {'to do' if name in undone else 'done '}  {name:{width}}  {points}")
    lines.append(counts_text(sweep, to_do))
    return "\n".join(lines)


def counts_text(sweep: Sweep, to_do: Sequence[str]) -> str:
    """Such as `96 steps, 41 distinct, 30 to do: about 40 s of work as such steps took before`."""
    text = f"{sweep.num_planned} steps, {len(sweep.steps)} distinct, {len(to_do)} to do"
    if not to_do:
        return text
    seconds = [sweep.estimate_seconds(name) for name in to_do]
    known = [one for one in seconds if one is not None]
    if not known:
        told = "no step of these kinds has run before"
    else:
        unknown = len(to_do) - len(known)
        more = f", besides {steps_text(unknown)} of which it is not known" if unknown else ""
        told = f"about {duration_text(sum(known))} of work as such steps took before{more}"
    return f"{text}: {told}"


def results_text(results: Sequence[PointResult]) -> str:
    """A table: a line for each point."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("point", justify="right")
    table.add_column("overrides", overflow="fold")
    for name in ("artifact", "size", "programs", "own s", "shared s", "top-1"):
        table.add_column(name, justify="left" if name == "artifact" else "right")
    for one in results:
        if one.artifact is None:
            table.add_row(str(one.number), " ".join(one.overrides), "not built")
            continue
        figures = one.qualification or {}
        table.add_row(
            str(one.number),
            " ".join(one.overrides),
            one.artifact.name,
            size_text(one.size or 0),
            str(one.programs),
            f"{one.own_seconds:.1f}",
            f"{one.shared_seconds:.1f}",
            f"{figures.get('top1_agreement', 0):.0%}",
        )
    text = io.StringIO()
    Console(file=text, width=120, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())
