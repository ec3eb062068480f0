"""Lines that the texts about plans and about artifacts share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from furiosa_build.core.text import size_text
from furiosa_build.plan.budget.placement import EMULATED, Element


def placement_lines(used: Sequence[Element]) -> Iterator[str]:
    """What lies on which element; no line for a model on one CPU."""
    if len(used) == 1 and not used[0].name.startswith("npu"):
        return
    yield f"{len(used)} elements, each {EMULATED}"
    for one in used:
        yield (
            f"  {one.name:22} replica {one.replica}, stage {one.stage}, rank {one.rank}: layers {one.layers[0]} to "
            f"{one.layers[1]}, parameters {size_text(one.parameters)}, KV cache {size_text(one.kv_cache)}"
        )


def random_note(seed: int | None) -> list[str]:
    """A warning if the weights are drawn from a seed."""
    return [] if seed is None else [f"THE WEIGHTS ARE RANDOM, drawn from seed {seed}"]
