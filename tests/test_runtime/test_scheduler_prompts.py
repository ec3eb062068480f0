"""Prompts in pieces, and the order of prompts offline."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from furiosa_build.runtime.scheduling.scheduler import Scheduler

from .scheduling import Runner, continuation, refused, request, steps

# Prompts in pieces


def test_decode_steps_come_between_the_pieces_of_a_prompt() -> None:
    runner = Runner([(1, 8)], [(4, 64)], [(1, 8, 64)], num_blocks=200, prefill_chunk_size=8)
    runner.scheduler.add(request("short", 3, max_tokens=5))
    runner.step()
    runner.scheduler.add(request("long", 21, max_tokens=2))
    assert steps(runner) == [
        *([("long", 8)], [("short", 1)]),
        *([("long", 8)], [("short", 1)]),
        *([("long", 5)], [("long", 1), ("short", 1)]),
        [("short", 1)],
    ]


def test_without_chunks_a_prompt_is_cut_only_where_no_prefill_bucket_takes_it() -> None:
    runner = Runner([(1, 8), (1, 16)], [(4, 64)], [(1, 4, 64), (1, 8, 64)], num_blocks=200, enable_prefix_caching=False)
    assert runner.scheduler.max_prompt_tokens == 64
    for name, prompt in (("a", 16), ("b", 30)):
        runner.scheduler.add(request(name, prompt, max_tokens=1))
    batches = []
    while (batch := runner.step()) is not None:
        batches.append((batch.pipeline.name, batch.counts))
    # The last piece takes the smallest bucket that holds it.
    assert batches == [
        *(("prefill-1x16", [16]), ("prefill-1x16", [16])),
        *(("append-1x8x64", [8]), ("append-1x8x64", [6])),
    ]


def test_pieces_of_several_prompts_run_side_by_side() -> None:
    runner = Runner([(2, 8)], [(4, 64)], [(2, 8, 64)], num_blocks=200, prefill_chunk_size=8)
    for name, prompt in (("a", 10), ("b", 20), ("c", 8)):
        runner.scheduler.add(request(name, prompt, max_tokens=2))
    assert steps(runner) == [
        [("a", 8), ("b", 8)],
        [("a", 2), ("b", 8)],
        [("a", 1)],
        [("b", 4), ("c", 8)],
        [("b", 1), ("c", 1)],
    ]


def test_the_context_of_an_append_bucket_bounds_the_pieces() -> None:
    runner = Runner([(1, 8)], [(4, 64)], [(1, 8, 12), (1, 2, 20)], num_blocks=200)
    runner.scheduler.add(request("a", 15, max_tokens=1))
    assert steps(runner) == [[("a", 8)], [("a", 4)], [("a", 2)], [("a", 1)]]
    refused(runner, 21, 1, r"21 tokens, more than any prefill or append bucket(.|\n)*append-1x2x20")


def test_a_prompt_that_append_buckets_do_not_reach_is_not_cut() -> None:
    runner = Runner([(1, 16)], [(1, 64)], [(1, 4, 8)], num_blocks=200, prefill_chunk_size=4)
    for name, prompt in (("a", 7), ("b", 12)):
        runner.scheduler.add(request(name, prompt, max_tokens=1))
    assert steps(runner) == [[("a", 4)], [("a", 3)], [("b", 12)]]


def test_a_request_is_preempted_and_aborted_in_the_middle_of_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    computed, preempt = [], Scheduler.preempt
    monkeypatch.setattr(Scheduler, "preempt", lambda self, r: (computed.append(r.num_computed), preempt(self, r)))
    runner = Runner([(1, 4)], [(2, 12)], [(1, 4, 12)], num_blocks=14, prefill_chunk_size=4, enable_prefix_caching=False)
    old, young = request("old", 4, max_tokens=9), request("young", 9, max_tokens=3)
    runner.scheduler.add(old)
    for _ in range(2):
        runner.step()
    runner.scheduler.add(young)
    steps(runner)
    assert computed == [4]
    assert runner.finished == {"old": continuation([1, 2, 3, 4], 9), "young": continuation(range(1, 10), 3)}
    aborted = request("aborted", 9, max_tokens=3)
    runner.scheduler.add(aborted)
    runner.step()
    assert aborted.num_computed == 4
    runner.scheduler.remove(aborted)
    runner.scheduler.check_integrity()
    assert runner.scheduler.blocks.num_free == 14


def test_of_two_stages_each_has_half_of_those_that_decode() -> None:
    """One alone would leave the other stage idle; all in one batch, too."""
    runner = Runner([(4, 8)], [(4, 16)], num_blocks=200, num_stages=2)
    for name in "abcd":
        runner.scheduler.add(request(name, [ord(name)], max_tokens=4))
    assert steps(runner) == [
        [(name, 1) for name in "abcd"],
        *([("a", 1), ("b", 1)], [("c", 1), ("d", 1)]) * 3,
    ]


# Offline


def work(prompts: Sequence[int], *, is_offline: bool, chunk_size: int | None = None) -> tuple[int, int, int]:
    """Steps, tokens computed by prefills, and slots read by decode steps, padding included, for such prompts."""
    runner = Runner(
        [(1, 16), (4, 16), (1, 64), (4, 64)],
        [(8, 32), (8, 96)],
        [(4, 16, 64)],
        num_blocks=500,
        prefill_chunk_size=chunk_size,
        is_offline=is_offline,
    )
    for number, prompt in enumerate(prompts):
        runner.scheduler.add(request(str(number), prompt, max_tokens=4 + number % 5))
    computed = read = count = 0
    while (batch := runner.step()) is not None:
        count += 1
        size = batch.pipeline.batch_size
        if batch.pipeline.phase == "decode":
            read += size * batch.pipeline.context_length
        else:
            computed += size * batch.pipeline.query_length
    expected = {str(i): continuation(range(1, n + 1), 4 + i % 5) for i, n in enumerate(prompts)}
    assert runner.finished == expected
    return count, computed, read


MIXED = [3, 60, 5, 50, 9, 64, 12, 58, 16, 7, 61, 4, 2, 55, 11, 63]


def test_offline_there_is_less_padding_and_there_are_fewer_steps() -> None:
    online, offline = work(MIXED, is_offline=False), work(MIXED, is_offline=True)
    assert all(less < more for less, more in zip(offline, online, strict=True)), (offline, online)
    online, offline = (work(MIXED, is_offline=each, chunk_size=16) for each in (False, True))
    assert offline[0] < online[0]


def test_offline_the_longest_prompts_come_first() -> None:
    runner = Runner([(2, 16)], [(4, 32)], [(2, 4, 32)], num_blocks=500, prefill_chunk_size=4, is_offline=True)
    for name, prompt in (("a", 3), ("b", 9), ("c", 3), ("d", 10)):
        runner.scheduler.add(request(name, prompt, max_tokens=2))
    assert steps(runner) == [
        *([("d", 4), ("b", 4)], [("d", 4), ("b", 4)], [("d", 2), ("b", 1)]),
        [("a", 3), ("c", 3)],
        [("d", 1), ("b", 1), ("a", 1), ("c", 1)],
    ]
