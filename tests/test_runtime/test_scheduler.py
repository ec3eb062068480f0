from __future__ import annotations

from collections.abc import Sequence

import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.scheduling.scheduler import Scheduler

from .scheduling import Runner, beam_request, best_beams, continuation, request, steps


@pytest.mark.parametrize(
    ("prompts", "bucket"),
    [
        ([3], "prefill-1x16"),
        ([17], "prefill-1x64"),
        ([10, 12, 5], "prefill-4x16"),
        ([60, 3], "prefill-1x64"),  # padding the short one to 64 would cost more than running it alone
        ([64, 64, 64], "prefill-4x64"),
    ],
)
def test_prefill_takes_the_cheapest_bucket(prompts: list[int], bucket: str) -> None:
    runner = Runner([(4, 64), (1, 64), (4, 16), (1, 16)], [(8, 128)], num_blocks=1000)
    for number, prompt in enumerate(prompts):
        runner.scheduler.add(request(str(number), prompt))
    assert runner.run_all()[0] == bucket


@pytest.mark.parametrize(
    ("prompts", "bucket"),
    [
        ([3], "decode-1x16"),
        ([15], "decode-1x16"),
        ([16], "decode-1x64"),
        ([3, 15], "decode-4x16"),
        ([3, 16], "decode-2x64"),
        ([16, 16, 16], "decode-4x128"),
    ],
)
def test_decode_takes_the_smallest_bucket_that_fits(prompts: list[int], bucket: str) -> None:
    decode = [(4, 128), (2, 64), (4, 16), (1, 64), (1, 16)]
    runner = Runner([(1, 32)], decode, num_blocks=1000)
    for number, prompt in enumerate(prompts):
        runner.scheduler.add(request(str(number), prompt))
    names = runner.run_all()
    assert names[len(prompts)] == bucket


def test_running_requests_take_turns_when_no_bucket_holds_them_all() -> None:
    runner = Runner([(1, 32)], [(3, 8), (1, 32)], num_blocks=100)
    for name, prompt in (("long", 9), ("short", 2), ("longer", 12)):
        runner.scheduler.add(request(name, prompt, max_tokens=4))
    for _ in range(3):
        runner.step()
    turns = []
    while (batch := runner.step()) is not None:
        turns.append([request.request_id for request in batch.requests])
    assert turns == [["long"], ["short"], ["longer"]] * 3


def test_a_request_waits_until_there_are_blocks() -> None:
    runner = Runner([(1, 8), (4, 8)], [(4, 16)], num_blocks=10)
    for name in "ab":
        runner.scheduler.add(request(name, 6, max_tokens=3))
    assert runner.run_all() == ["prefill-1x8", "decode-4x16", "decode-4x16"] * 2


def test_no_more_run_than_the_largest_decode_batch_holds() -> None:
    runner = Runner([(4, 8)], [(1, 16), (2, 16)], num_blocks=100)
    for name in "abc":
        runner.scheduler.add(request(name, 2, max_tokens=2))
    assert runner.run_all() == ["prefill-4x8", "decode-2x16", "prefill-4x8", "decode-1x16"]


def test_nobody_overtakes_a_waiting_request() -> None:
    runner = Runner([(1, 8), (4, 8)], [(4, 16)], num_blocks=10)
    for name, prompt in (("first", 6), ("large", 6), ("small", 1)):
        runner.scheduler.add(request(name, prompt, max_tokens=3))
    runner.run_all()
    assert list(runner.finished) == ["first", "large", "small"]


def test_spare_blocks_keep_new_requests_out_but_never_the_first() -> None:
    def admitted(spare_blocks_ratio: float) -> int:
        runner = Runner([(4, 8)], [(4, 16)], num_blocks=10, spare_blocks_ratio=spare_blocks_ratio)
        for name in "abc":
            runner.scheduler.add(request(name, 3, max_tokens=2))
        batch = runner.step()
        assert batch is not None
        return len(batch.requests)

    assert [admitted(ratio) for ratio in (0.0, 0.2, 0.5, 1.0)] == [3, 2, 1, 1]


def test_the_youngest_is_preempted_and_recomputed() -> None:
    runner = Runner([(2, 4)], [(2, 12)], num_blocks=10, enable_prefix_caching=False)
    for name in ("old", "young"):
        runner.scheduler.add(request(name, 4, max_tokens=7))
    names = runner.run_all()
    # Both prefilled, 2 steps; the young one gives way, 4 more steps of the old one; then it is prefilled again,
    # its 2 tokens run without sampling, and 4 more with.
    assert names == ["prefill-2x4"] + ["decode-2x12"] * 6 + ["prefill-2x4"] + ["decode-2x12"] * 6
    assert runner.finished["young"] == continuation([1, 2, 3, 4], 7)
    assert runner.finished["old"] == continuation([1, 2, 3, 4], 7)
    assert list(runner.finished) == ["old", "young"]
    assert runner.scheduler.stats().preemptions == 1


def test_the_preempted_is_first_in_the_queue_again() -> None:
    runner = Runner([(2, 4)], [(2, 12)], num_blocks=10, enable_prefix_caching=False)
    for name, prompt, max_tokens in (("old", 4, 7), ("young", 4, 7), ("youngest", 1, 1)):
        runner.scheduler.add(request(name, prompt, max_tokens))
    runner.run_all()
    # There would have been a block for the youngest while the old one ran, but its turn is after the young one.
    assert list(runner.finished) == ["old", "youngest", "young"]


def test_one_that_gives_way_to_others_does_not_stall_them() -> None:
    """Only one fits into the bucket; the youngest, in its turn, finds no block and preempts itself."""
    runner = Runner([(1, 8)], [(2, 4), (1, 12)], num_blocks=11)
    for name in ("old", "young"):
        runner.scheduler.add(request(name, 5, max_tokens=6))
    runner.run_all()
    assert list(runner.finished) == ["old", "young"]


def test_generation_ends_where_no_bucket_holds_the_next_step() -> None:
    runner = Runner([(1, 8)], [(1, 12)], num_blocks=12)
    runner.scheduler.add(request("a", 5, max_tokens=None))
    runner.run_all()
    assert runner.finished["a"] == continuation(range(1, 6), 8)


def refused(runner: Runner, prompt: int, max_tokens: int | None, message: str) -> None:
    before = runner.scheduler.num_unfinished
    with pytest.raises(UserError, match=message):
        runner.scheduler.add(request("refused", prompt, max_tokens))
    assert runner.scheduler.num_unfinished == before


def test_refusals() -> None:
    runner = Runner([(1, 8), (2, 16)], [(1, 32)], num_blocks=5, block_size=4)
    refused(runner, 17, 1, r"17 tokens(.|\n)*at most 16 tokens; buckets: prefill-1x8, prefill-2x16")
    refused(runner, 10, 12, "may need 6 KV blocks, and there are 5")
    refused(runner, 10, None, "may need 8 KV blocks")
    runner.scheduler.add(request("fits", 10, 11))
    runner.scheduler.add(request("fits too", 10, 1))
    runner.run_all()
    assert list(runner.finished) == ["fits", "fits too"]


# Figures


def test_the_use_of_every_bucket_is_counted() -> None:
    append = [(1, 4, 32)]
    runner = Runner([(1, 8), (2, 8), (4, 8)], [(4, 32)], append, num_blocks=200, enable_prefix_caching=False)
    for name, prompt in (("cut", 11), ("a", 3), ("b", 5)):
        runner.scheduler.add(request(name, prompt, max_tokens=3))
    runner.scheduler.add(beam_request("beams", 6, max_tokens=2))
    use: dict[str, list[int]] = {}
    while (batch := runner.step()) is not None:
        batches, tokens = use.get(batch.pipeline.name, (0, 0))
        rows = sum(len(batch.sequences(r)) * n for r, n in zip(batch.requests, batch.counts, strict=True))
        use[batch.pipeline.name] = [batches + 1, tokens + rows]
    buckets = runner.scheduler.stats().buckets
    assert list(buckets) == ["prefill-1x8", "prefill-2x8", "prefill-4x8", "append-1x4x32", "decode-4x32"]
    assert {name: [each.batches, each.tokens] for name, each in buckets.items() if each.batches} == use
    # Every token but each text's last is computed once.
    assert sum(each.tokens for each in buckets.values()) == (11 + 3 + 5 + 6) + 3 * 2 + 2 * 1
    rest = buckets["append-1x4x32"]
    assert (rest.phase, rest.batch_size, rest.query_length, rest.context_length) == ("append", 1, 4, 32)
    assert (rest.batches, rest.tokens, rest.places) == (1, 3, 4)
    assert buckets["prefill-2x8"].places == 16 * buckets["prefill-2x8"].batches


def test_what_failed_to_run_is_not_counted() -> None:
    """Neither as a batch, nor as a preemption: that is what a lack of KV blocks does."""
    scheduler = Runner([(2, 4)], [(2, 12)], num_blocks=10, enable_prefix_caching=False).scheduler
    for name in ("old", "young"):
        scheduler.add(request(name, 4, max_tokens=7))
    for _ in range(3):
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.requeue(batch)
    stats = scheduler.stats()
    assert (stats.preemptions, stats.running, stats.waiting) == (0, 0, 2)
    assert not any(use.batches or use.tokens for use in stats.buckets.values())


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


# Beams


def test_the_beams_of_a_search_run_in_one_decode_batch_and_are_prefilled_once() -> None:
    runner = Runner([(1, 8)], [(4, 16), (6, 16)], num_blocks=200)
    runner.scheduler.add(beam_request("beams", 5, max_tokens=3, width=4))
    runner.scheduler.add(request("alone", 3, max_tokens=3))
    runner.scheduler.add(request("also", 3, max_tokens=3))
    names, rows = [], []
    while (batch := runner.step()) is not None:
        names.append(batch.pipeline.name)
        rows.append([(r.request_id, len(batch.sequences(r))) for r in batch.requests])
    together = [("beams", 4), ("alone", 1), ("also", 1)]
    assert rows == [[("beams", 1)], [("alone", 1)], [("also", 1)], together, together]
    assert names == ["prefill-1x8"] * 3 + ["decode-6x16"] * 2
    assert runner.finished["beams"] == best_beams(range(1, 6), 3, width=4)
    assert runner.finished["alone"] == continuation([1, 2, 3], 3)


def test_a_search_takes_as_many_places_as_it_has_beams() -> None:
    runner = Runner([(4, 8)], [(6, 16)], num_blocks=200)
    for name in "ab":
        runner.scheduler.add(beam_request(name, 3, max_tokens=2, width=4))
    assert runner.run_all() == ["prefill-4x8", "decode-6x16"] * 2


@pytest.mark.parametrize("block_size", [1, 4])
def test_beams_share_the_blocks_of_their_prompt(block_size: int) -> None:
    runner = Runner([(1, 32)], [(4, 48)], num_blocks=200, block_size=block_size)
    blocks = runner.scheduler.blocks
    runner.scheduler.add(beam_request("a", 30, max_tokens=10, width=4))
    used = []
    while runner.step() is not None:
        used.append(blocks.num_blocks - blocks.num_free)
    prompt = blocks.blocks_for(30)
    assert used[0] == prompt
    assert all(number <= prompt + 4 * new for new, number in enumerate(used))
    assert max(used) > prompt + blocks.blocks_for(10)
    assert used[-1] == 0


def test_beams_that_gave_way_are_computed_again() -> None:
    """The prompt by a prefill, for all beams at once; their own tokens by decode steps that take none from logits."""
    runner = Runner([(2, 4)], [(4, 12)], num_blocks=16)
    runner.scheduler.add(request("old", 4, max_tokens=8))
    young = beam_request("young", 4, max_tokens=6, width=2)
    runner.scheduler.add(young)
    names = runner.run_all()
    assert names.count("prefill-2x4") == 2, "the young one gave way once"
    assert runner.finished == {"old": continuation([1, 2, 3, 4], 8), "young": best_beams([1, 2, 3, 4], 6)}


def test_a_search_that_gave_way_waits_for_room_for_all_its_beams() -> None:
    """Let in as soon as there is room for one of them, it would give way again."""
    runner = Runner([(2, 4)], [(4, 16)], num_blocks=14, enable_prefix_caching=False)
    runner.scheduler.add(request("old", 4, max_tokens=10))
    runner.scheduler.add(beam_request("young", 4, max_tokens=6, width=2))
    runner.run_all()
    assert runner.finished == {"old": continuation([1, 2, 3, 4], 10), "young": best_beams([1, 2, 3, 4], 6)}
    assert runner.scheduler.stats().preemptions == 1


def test_a_search_that_may_need_too_many_blocks_is_refused() -> None:
    runner = Runner([(1, 8)], [(4, 32)], num_blocks=20, block_size=4)
    with pytest.raises(UserError, match="may need 21 KV blocks, and there are 20"):
        runner.scheduler.add(beam_request("a", 3, max_tokens=6, width=4))
    runner.scheduler.add(beam_request("a", 3, max_tokens=5, width=4))
    assert runner.run_all()


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


def test_an_artifact_without_decode_buckets_gives_one_token() -> None:
    runner = Runner([(1, 8)], [], num_blocks=8)
    runner.scheduler.add(request("a", 5, max_tokens=3))
    assert runner.run_all() == ["prefill-1x8"]
    assert runner.finished["a"] == continuation(range(1, 6), 1)


def test_a_context_over_every_bucket_is_a_mistake_of_the_engine() -> None:
    scheduler = Runner([(1, 8)], [(1, 4)], num_blocks=8).scheduler
    scheduler.add(request("a", 6, max_tokens=9))
    batch = scheduler.schedule()
    assert batch is not None
    for each in scheduler.advance(batch):
        each.tokens.append(0)
    with pytest.raises(RuntimeError, match="no decode bucket holds"):
        scheduler.schedule()


def test_check_integrity_finds_what_is_wrong() -> None:
    runner = Runner([(1, 8)], [(1, 16)], num_blocks=20)
    waiting, running = request("waiting", 4), request("running", 4)
    runner.scheduler.add(running)
    runner.step()
    runner.scheduler.add(waiting)
    scheduler = runner.scheduler

    scheduler._queues.waiting.append(running)
    with pytest.raises(RuntimeError, match="queued twice"):
        scheduler.check_integrity()
    scheduler._queues.waiting.pop()
    waiting.num_computed = 1
    with pytest.raises(RuntimeError, match="waiting request counts tokens"):
        scheduler.check_integrity()
    waiting.num_computed = 0
    running.num_computed = 9
    with pytest.raises(RuntimeError, match="fewer KV slots"):
        scheduler.check_integrity()
    running.num_computed = 4
    scheduler.blocks.free(running.sequences[0])
    with pytest.raises(RuntimeError, match="KV blocks of"):
        scheduler.check_integrity()
