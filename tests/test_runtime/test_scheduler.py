from __future__ import annotations

import pytest

from .scheduling import Runner, beam_request, continuation, refused, request


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
    # Both prefilled, 2 steps; the young one is preempted, 4 more steps of the old one; then it is prefilled again,
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


def test_one_that_is_preempted_does_not_stall_them() -> None:
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
