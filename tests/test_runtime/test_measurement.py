"""What is measured, on the toy model, with a clock that only steps move."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.engine_args import EngineArgs
from furiosa_build.runtime.measurement import buckets, load
from furiosa_build.runtime.measurement.engine import load_engine
from furiosa_build.runtime.measurement.timing import ENOUGH, Timing
from furiosa_build.runtime.request import RequestOutput

from . import toy

SECONDS = {"prefill": 0.5, "append": 0.25, "decode": 0.125}
"""How long a run of a bucket takes, by its phase."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which each step moves by what its bucket takes."""
    now = [0.0]
    step = LLMEngine.step

    def timed(engine: LLMEngine) -> list[RequestOutput]:
        before = engine.stats().buckets
        outputs = step(engine)
        for name, use in engine.stats().buckets.items():
            now[0] += (use.batches - before[name].batches) * SECONDS[use.phase]
        return outputs

    monkeypatch.setattr(LLMEngine, "step", timed)
    for module in (buckets, load):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


@pytest.mark.usefixtures("clock")
def test_each_bucket_is_filled_and_timed(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    del toy_backend
    sizes = {"prefill": [(1, 16), (2, 16)], "append": [(1, 8, 64)], "decode": [(1, 64), (4, 64), (4, 128)]}
    # With half of the blocks in reserve, four prompts of 64 tokens would not run together.
    artifact = toy.write_artifact(tmp_path / "a", toy.artifact_data(sizes, num_blocks=130, spare_blocks_ratio=0.6))
    engine = LLMEngine.from_engine_args(buckets.bucket_args(artifact))
    found = {speed.name: speed for speed in buckets.measure_buckets(engine, 60)}
    assert found.keys() == engine.stats().buckets.keys()
    for name, use in engine.stats().buckets.items():
        timing, speed = found[name].timing, found[name].tokens_per_second
        assert timing is not None, name
        assert timing.repetitions >= ENOUGH
        assert (timing.median, timing.noise) == (SECONDS[use.phase], 0)
        assert speed == use.batch_size * use.query_length / SECONDS[use.phase]


def test_a_bucket_that_no_prompts_bring_about_has_no_time(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    """Prompts of 16 tokens run in pieces of 8, so that the bucket for 16 is never full; of 4 requests one may run."""
    del toy_backend
    sizes = {"prefill": [(1, 16)], "append": [(1, 8, 64)], "decode": [(1, 64), (4, 64)]}
    data = toy.artifact_data(sizes, num_blocks=200, prefill_chunk_size=8, max_processing_samples=1)
    engine = LLMEngine.from_engine_args(buckets.bucket_args(toy.write_artifact(tmp_path / "a", data)))
    found = {speed.name: speed.timing for speed in buckets.measure_buckets(engine, 1)}
    assert found["prefill-1x16"] is None
    assert found["decode-4x64"] is None
    assert found["append-1x8x64"] is not None
    assert found["decode-1x64"] is not None


@pytest.mark.usefixtures("clock")
def test_runs_that_are_not_full_do_not_count(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    """Of a prompt of 20 tokens 16 run in the prefill bucket, and 4 in the one for 8."""
    del toy_backend
    sizes = {"prefill": [(1, 16)], "append": [(1, 8, 20)], "decode": [(1, 64)]}
    engine = LLMEngine.from_engine_args(
        buckets.bucket_args(toy.write_artifact(tmp_path / "a", toy.artifact_data(sizes)))
    )
    found = {speed.name: speed.timing for speed in buckets.measure_buckets(engine, 60)}
    assert engine.stats().buckets["append-1x8x20"].batches > 0
    assert found["append-1x8x20"] is None


def test_it_ends_when_the_time_is_over(engine: LLMEngine, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the medians never become stable."""
    drawn, step = random.Random(0), LLMEngine.step

    def unsteady(engine: LLMEngine) -> list[RequestOutput]:
        clock[0] += drawn.random()
        return step(engine)

    monkeypatch.setattr(LLMEngine, "step", unsteady)
    found = list(buckets.measure_buckets(engine, 200))
    assert any(speed.timing is not None and not speed.timing.is_stable for speed in found)
    # Beyond its time a bucket takes no more than one filling, and another that warms it up.
    assert 200 * len(found) * 0.5 < clock[0] < 400 * len(found)


@pytest.mark.usefixtures("clock")
def test_a_load_is_served_by_as_many_clients(toy_artifact: Path) -> None:
    served = load.measure_load(toy_artifact, load.Load(clients=1, requests=3, input_tokens=5, output_tokens=9))
    assert (served.first_token.median, served.first_token.repetitions) == (SECONDS["prefill"], 3)
    assert served.later_token is not None
    assert served.later_token.median == SECONDS["decode"]
    assert served.seconds == 3 * (SECONDS["prefill"] + 8 * SECONDS["decode"])
    assert served.tokens_per_second == 27 / served.seconds
    together = load.measure_load(toy_artifact, load.Load(clients=3, requests=3, input_tokens=5, output_tokens=9))
    assert together.seconds < served.seconds, "decode steps are shared"


def test_a_load_that_does_not_fit_is_refused(toy_artifact: Path) -> None:
    with pytest.raises(UserError, match="the prompt has 5000 tokens"):
        load.measure_load(toy_artifact, load.Load(clients=1, requests=1, input_tokens=5000, output_tokens=1))


def test_what_loading_takes(toy_artifact: Path) -> None:
    loaded = load_engine(EngineArgs(model=str(toy_artifact)))
    assert loaded.seconds > 0
    assert loaded.memory is None or loaded.memory.private < 1 << 30
    assert loaded.machine.endswith("cores")


@given(st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=50))
def test_timings_are_numpys_median_and_quartiles(seconds: list[float]) -> None:
    timing = Timing.of(seconds)
    # Both interpolate in float64.
    first, median, third = numpy.quantile(seconds, [0.25, 0.5, 0.75])
    assert timing.median == pytest.approx(median)
    assert timing.noise == pytest.approx((third - first) / 2 / median, abs=1e-9)
