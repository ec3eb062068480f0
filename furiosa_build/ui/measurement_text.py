"""How fast an artifact is, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from furiosa_build.core.text import size_text
from furiosa_build.runtime.measurement.buckets import BucketSpeed
from furiosa_build.runtime.measurement.engine import LoadedEngine
from furiosa_build.runtime.measurement.load import Throughput
from furiosa_build.runtime.measurement.timing import STABLE, Timing

HEAD = f"{'bucket':24}{'ms':>10}{'tokens/s':>12}   noise"


def loaded_text(loaded: LoadedEngine) -> str:
    """What it took to load the artifact."""
    memory = loaded.memory
    taken = (
        "" if memory is None else f"; {size_text(memory.private)} of memory, {size_text(memory.mapped)} of mapped files"
    )
    return f"machine    {loaded.machine}\nloaded     in {loaded.seconds:.2f} s{taken}"


def bucket_line(speed: BucketSpeed) -> str:
    """A row of the table that `HEAD` begins."""
    if speed.timing is None or speed.tokens_per_second is None:
        return f"{speed.name:24}{'-':>10}{'-':>12}   no load of equal requests fills it"
    return f"{speed.name:24}{speed.timing.median * 1e3:>10.2f}{speed.tokens_per_second:>12.1f}   {_noise(speed.timing)}"


def closing_lines(speeds: Sequence[BucketSpeed], throughput: Throughput | None) -> Iterator[str]:
    """How a load was served; a warning if medians are not stable."""
    if throughput is not None:
        load, later = throughput.load, throughput.later_token
        yield (
            f"load       {load.requests} requests of {load.input_tokens} + {load.output_tokens} tokens, "
            f"{load.clients} at a time"
        )
        yield (
            f"           {throughput.tokens_per_second:.1f} tokens/s in {throughput.seconds:.2f} s; to the first token "
            f"{throughput.first_token.median * 1e3:.1f} ms"
            + ("" if later is None else f", per further token {later.median * 1e3:.2f} ms (medians)")
        )
    if unstable := [speed.name for speed in speeds if speed.timing is not None and not speed.timing.is_stable]:
        yield f"not stable within {STABLE:.0%}: {', '.join(unstable)}; measure longer, or on a quieter machine"


def _noise(timing: Timing) -> str:
    return f"±{timing.noise:.1%} of {timing.repetitions} steps"


def measurement_data(
    loaded: LoadedEngine, speeds: Sequence[BucketSpeed], throughput: Throughput | None
) -> dict[str, Any]:
    """All figures as plain data: times in seconds, memory in bytes."""
    return {
        "machine": loaded.machine,
        "artifact_id": loaded.engine.artifact.metadata.artifact_id,
        "load_seconds": loaded.seconds,
        "memory": None if loaded.memory is None else loaded.memory._asdict(),
        "buckets": [{**asdict(speed), "tokens_per_second": speed.tokens_per_second} for speed in speeds],
        "load": None
        if throughput is None
        else {**asdict(throughput), "tokens_per_second": throughput.tokens_per_second},
    }
