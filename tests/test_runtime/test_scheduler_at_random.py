"""The scheduler under random loads: each request ends, with the tokens that it has alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.request import Request

from .scheduling import Buckets, Runner, beam_request, best_beams, continuation, request


@settings(max_examples=150, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.integers(1, 10), st.integers(4, 10), st.booleans()), min_size=3, max_size=6),
    block_size=st.sampled_from([1, 2, 4]),
    spare=st.integers(0, 12),
    num_stages=st.integers(1, 2),
    aborted=st.sets(st.integers(0, 5), max_size=2),
    after=st.integers(1, 25),
)
def test_beams_and_others_in_a_pool_that_one_of_them_may_fill(
    kinds: list[tuple[int, int, bool]], block_size: int, spare: int, num_stages: int, aborted: set[int], after: int
) -> None:
    """They are preempted all the time, some are aborted, and each ends with what it has alone."""
    most = max(-(-prompt // block_size) + 2 * number for prompt, number, _ in kinds)
    runner = Runner(
        [(2, 4)],
        [(4, 12), (6, 24)],
        [(1, 4, 24)],
        num_blocks=most + spare,
        block_size=block_size,
        prefill_chunk_size=3,
        num_stages=num_stages,
    )
    requests, expected = [], {}
    for number, (prompt, new, beams) in enumerate(kinds):
        requests.append((beam_request if beams else request)(str(number), prompt, new))
        expected[str(number)] = (best_beams if beams else continuation)(range(1, prompt + 1), new)
        runner.scheduler.add(requests[-1])
    for _ in range(after):
        runner.step()
    for number in aborted & set(range(len(kinds))):
        if str(number) not in runner.finished:
            runner.scheduler.remove(requests[number])
            del expected[str(number)]
            runner.scheduler.check_integrity()
    runner.run_all()
    assert runner.finished == expected
    assert runner.scheduler.blocks.num_free == runner.scheduler.blocks.num_blocks


class Scheduling(RuleBasedStateMachine):
    """Random arrivals, steps and aborts over tiny pools: every request ends, with the tokens it has alone."""

    @initialize(
        num_blocks=st.integers(1, 40),
        block_size=st.sampled_from([1, 1, 2, 5, 16]),
        spare=st.sampled_from([0.0, 0.2, 1.0]),
        buckets=st.sampled_from(
            [
                ([(1, 4), (2, 8)], [(1, 8), (4, 16)]),
                ([(4, 4)], [(1, 40)]),
                ([(1, 16)], [(8, 12), (2, 20), (1, 30)]),
                ([(2, 8), (1, 3)], []),
                ([(2, 4)], [(4, 16)], [(1, 4, 12), (2, 2, 16)]),
                ([(1, 4)], [(1, 8), (2, 20)], [(1, 3, 8)]),
                ([(1, 4), (2, 8)], [(2, 8), (4, 16)]),
                ([(2, 4)], [(6, 24)], [(1, 4, 12), (2, 2, 16)]),
            ]
        ),
        chunk_size=st.none() | st.integers(1, 5),
        is_offline=st.booleans(),
        enable_prefix_caching=st.sampled_from([True, True, True, False]),
        num_stages=st.integers(1, 3),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        spare: float,
        buckets: tuple[Buckets, ...],
        chunk_size: int | None,
        is_offline: bool,
        enable_prefix_caching: bool,
        num_stages: int,
    ) -> None:
        self.runner = Runner(
            *buckets,
            num_blocks=num_blocks,
            block_size=block_size,
            spare_blocks_ratio=spare,
            prefill_chunk_size=chunk_size,
            is_offline=is_offline,
            enable_prefix_caching=enable_prefix_caching,
            num_stages=num_stages,
        )
        self.takes_beams = bool(buckets[1]) and all(batch % 2 == 0 for batch, _ in buckets[1])
        self.expected: dict[str, list[int] | list[list[int]]] = {}
        self.alive: dict[str, Request] = {}
        self.count = 0

    @rule(
        arriving=st.lists(
            st.tuples(
                # Some of few different tokens, so that they begin alike.
                st.lists(st.integers(0, 9), min_size=1, max_size=10)
                | st.lists(st.integers(0, 1), min_size=3, max_size=16),
                st.none() | st.integers(1, 15),
                st.booleans(),
            ),
            min_size=1,
            max_size=4,
        )
    )
    def arrive(self, arriving: list[tuple[list[int], int | None, bool]]) -> None:
        for prompt, max_tokens, beams in arriving:
            self._arrive(prompt, max_tokens, beams)

    def _arrive(self, prompt: list[int], max_tokens: int | None, beams: bool) -> None:
        scheduler = self.runner.scheduler
        name = f"r{self.count}"
        self.count += 1
        # One token more than the largest context: the last is never run. The prompt's bucket always gives one.
        number = max(1, min(max_tokens or 1000, scheduler.max_context + 1 - len(prompt)))
        needed = scheduler.blocks.blocks_for(len(prompt) + number - 1)
        new, expected = request(name, prompt, max_tokens), continuation
        if beams and self.takes_beams:
            needed = scheduler.blocks.blocks_for(len(prompt)) + 2 * (number - 1)
            new, expected = beam_request(name, prompt, number), best_beams
        if len(prompt) <= scheduler.max_prompt_tokens and needed <= scheduler.blocks.num_blocks:
            scheduler.add(new)
            self.alive[name] = new
            self.expected[name] = expected(prompt, number)
        else:
            with pytest.raises(UserError):
                scheduler.add(new)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        self.runner.scheduler.remove(self.alive.pop(name))
        del self.expected[name]

    @precondition(lambda self: self.alive)
    @rule(aborts=st.booleans())
    def fail(self, aborts: bool) -> None:
        """A batch does not run; one of its requests may be aborted before that is known."""
        batch = self.runner.scheduler.schedule()
        if batch is None:
            assert self.runner.in_flight, "all that could run is under way"
            return
        if aborts:
            name = batch.requests[0].request_id
            self.runner.scheduler.remove(self.alive.pop(name))
            del self.expected[name]
        self.runner.scheduler.requeue(batch)

    @rule(times=st.integers(1, 5))
    def step(self, times: int) -> None:
        for _ in range(times):
            has_work = bool(self.alive or self.runner.in_flight)
            assert (self.runner.step() is not None) == has_work
            self.alive = {name: r for name, r in self.alive.items() if name not in self.runner.finished}

    @invariant()
    def the_state_is_consistent(self) -> None:
        if hasattr(self, "runner"):
            self.runner.scheduler.check_integrity()
            assert self.runner.scheduler.num_unfinished == len(self.alive)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.run_all()
            assert self.runner.finished == self.expected
            assert self.runner.scheduler.blocks.num_free == self.runner.scheduler.blocks.num_blocks


TestScheduling = Scheduling.TestCase
TestScheduling.pytestmark = [pytest.mark.grid]
TestScheduling.settings = settings(max_examples=400, stateful_step_count=30, deadline=None)
