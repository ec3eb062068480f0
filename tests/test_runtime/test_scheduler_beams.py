"""The scheduler and beam searches."""

from __future__ import annotations

import pytest

from furiosa_build.core.errors import UserError

from .scheduling import Runner, beam_request, best_beams, continuation, request


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


def test_a_search_takes_as_many_rows_as_it_has_beams() -> None:
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


def test_preempted_beams_are_recomputed() -> None:
    """The prompt by a prefill, for all beams at once; their own tokens by decode steps that take none from logits."""
    runner = Runner([(2, 4)], [(4, 12)], num_blocks=16)
    runner.scheduler.add(request("old", 4, max_tokens=8))
    young = beam_request("young", 4, max_tokens=6, width=2)
    runner.scheduler.add(young)
    names = runner.run_all()
    assert names.count("prefill-2x4") == 2, "the young one is preempted once"
    assert runner.finished == {"old": continuation([1, 2, 3, 4], 8), "young": best_beams([1, 2, 3, 4], 6)}


def test_a_preempted_search_waits_for_blocks_for_all_its_beams() -> None:
    """Admitted as soon as there are blocks for one of them, it would be preempted again."""
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
