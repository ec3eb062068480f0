"""The scheduler with blocks that are cached by their tokens: what is computed, what is shared, who waits for whom."""

from __future__ import annotations

import pytest

from furiosa_build.runtime.request import Request
from furiosa_build.runtime.sampling.params import SamplingParams

from .scheduling import Runner, beam_request, best_beams, continuation, request, steps

BUCKETS = ([(1, 8), (1, 32)], [(4, 64)], [(1, 4, 64), (1, 16, 64)])
PROMPT = list(range(50, 70))


def run(runner: Runner, name: str, prompt: list[int], max_tokens: int = 2) -> tuple[Request, list[str]]:
    """A request alone, and the buckets that it took."""
    made = request(name, prompt, max_tokens)
    runner.scheduler.add(made)
    names = runner.run_all()
    assert runner.finished[name] == continuation(prompt, max_tokens)
    return made, names


@pytest.mark.parametrize(("block_size", "cached"), [(1, 19), (4, 16), (16, 16)])
def test_a_hit_computes_only_the_rest(block_size: int, cached: int) -> None:
    """At least one token is computed, also of a prompt that is cached as a whole."""
    runner = Runner(*BUCKETS, num_blocks=128, block_size=block_size)
    first, names = run(runner, "first", PROMPT)
    assert (first.num_cached_tokens, names) == (0, ["prefill-1x32", "decode-4x64"])
    runner.scheduler.add(again := request("again", PROMPT, 2))
    batch = runner.step()
    assert batch is not None
    assert (batch.pipeline.name, batch.counts) == ("append-1x4x64", [20 - cached])
    assert again.num_cached_tokens == cached
    runner.run_all()
    assert runner.finished["again"] == continuation(PROMPT, 2)
    stats = runner.scheduler.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.kv_blocks_used, stats.preemptions) == (40, cached, 0, 0)


def test_generated_tokens_are_cached_as_well() -> None:
    """The next turn of a conversation."""
    runner = Runner(*BUCKETS, num_blocks=64)
    run(runner, "first", PROMPT, max_tokens=10)
    said = continuation(PROMPT, 10)
    second, names = run(runner, "second", [*PROMPT, *said, 1, 2, 3])
    assert second.num_cached_tokens == 29, "the last token was never run"
    assert names[0] == "append-1x4x64"


def test_an_aborted_request_leaves_what_it_has_computed() -> None:
    runner = Runner(*BUCKETS, num_blocks=64, prefill_chunk_size=8)
    aborted = request("aborted", PROMPT)
    runner.scheduler.add(aborted)
    for _ in range(2):
        runner.step()
    runner.scheduler.remove(aborted)
    second, names = run(runner, "second", PROMPT)
    assert (second.num_cached_tokens, names[0]) == (16, "append-1x4x64")


def test_a_hit_that_spares_nothing_is_not_taken() -> None:
    """Append buckets of as many tokens would compute as much padding; but equal blocks are shared all the same."""
    runner = Runner([(1, 32)], [(4, 64)], [(1, 32, 64)], num_blocks=64)
    runner.scheduler.add(request("first", PROMPT))
    runner.step()
    runner.scheduler.add(second := request("second", [*PROMPT[:10], 1, 2]))
    batch = runner.step()
    assert batch is not None
    assert (batch.pipeline.name, second.num_cached_tokens) == ("prefill-1x32", 0)
    assert runner.scheduler.stats().kv_blocks_used == 20 + 2
    runner.run_all()


@pytest.mark.parametrize("append", [[], [(1, 4, 16)]])
def test_nothing_is_looked_up_without_append_buckets_that_fit(
    append: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner([(1, 32)], [(4, 64)], append, num_blocks=64)
    run(runner, "first", PROMPT)
    monkeypatch.setattr(runner.scheduler.blocks, "find_cached", lambda *_: pytest.fail("looked up"))
    second, names = run(runner, "second", PROMPT)
    assert (second.num_cached_tokens, names[0]) == (0, "prefill-1x32")


def test_the_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(*BUCKETS, num_blocks=64, enable_prefix_caching=False)
    for name in ("find_cached", "cache_full_blocks"):
        monkeypatch.setattr(runner.scheduler.blocks, name, lambda *_: pytest.fail("it is off"))
    run(runner, "first", PROMPT)
    second, names = run(runner, "second", PROMPT)
    assert (second.num_cached_tokens, names[0]) == (0, "prefill-1x32")


def test_requests_for_prompt_logprobs_take_no_hits_but_leave_blocks() -> None:
    runner = Runner(*BUCKETS, num_blocks=64)
    for name in "ab":
        made = request(name, PROMPT)
        made.params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
        runner.scheduler.add(made)
        assert runner.run_all() == ["prefill-1x32"]
        assert made.num_cached_tokens == 0
    assert run(runner, "c", PROMPT)[0].num_cached_tokens == 19


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_requests_with_an_equal_prefix_share_blocks(block_size: int, side_by_side: bool) -> None:
    """Whether the second found them, or both computed them in one batch."""
    runner = Runner([(1, 32), (2, 32)], [(4, 64)], [(1, 4, 64)], num_blocks=120, block_size=block_size)
    blocks, made = runner.scheduler.blocks, [request("a", PROMPT, 9), request("b", [*PROMPT, 1, 2], 9)]
    for each in made:
        runner.scheduler.add(each)
        if not side_by_side:
            runner.step()
    runner.step()
    assert [each.num_cached_tokens for each in made] == [0, 0 if side_by_side else 20]
    a, b = (blocks.slots(each.sequences[0]).tolist() for each in made)
    assert a[:20] == b[:20]
    assert blocks.num_blocks - blocks.num_free == len({slot // block_size for slot in [*a, *b]})
    runner.run_all()
    assert runner.finished == {each.request_id: continuation(each.prompt_token_ids, 9) for each in made}


def test_blocks_that_were_used_longest_ago_are_taken_first() -> None:
    runner = Runner(*BUCKETS, num_blocks=48)
    one, other, more = list(range(20)), list(range(20, 40)), list(range(40, 55))
    for name, prompt in (("one", one), ("other", other), ("one again", one), ("more", more)):
        run(runner, name, prompt, max_tokens=1)
    # 20 + 20 + 15 of 48: the last 7 of the other one are gone.
    assert len(runner.scheduler.blocks.find_cached(one, 20)) == 20
    assert len(runner.scheduler.blocks.find_cached(other, 20)) == 13


def test_blocks_of_nobody_neither_keep_a_request_waiting_nor_make_one_give_way() -> None:
    runner = Runner([(1, 8)], [(2, 16)], [(1, 2, 16)], num_blocks=16, spare_blocks_ratio=0.5)
    for number in range(5):
        run(runner, str(number), [number] * 8, max_tokens=9)
    stats = runner.scheduler.stats()
    assert (stats.preemptions, stats.kv_blocks_used, runner.scheduler.blocks.num_free) == (0, 0, 16)


@pytest.mark.parametrize("append", [[], [(1, 2, 16)]])
def test_one_that_gave_way_goes_on_with_what_is_left_of_its_blocks(append: list[tuple[int, ...]]) -> None:
    """With its generated tokens too, which are not computed again; append buckets are needed for a cut prompt only."""
    runner = Runner([(2, 4)], [(2, 12)], append, num_blocks=20)
    for each in (request("old", [1, 2, 3, 4], 3), young := request("young", [5, 6, 7, 8], 6)):
        runner.scheduler.add(each)
    for _ in range(2):
        runner.step()
    runner.scheduler.preempt(young)
    runner.scheduler.check_integrity()
    assert young.num_computed == 0
    ran = steps(runner)
    # Nothing is prefilled again; a token each, as if nothing had happened.
    assert ran == [[("old", 1), ("young", 1)], *[[("young", 1)]] * 3]
    assert young.num_cached_tokens == 0, "what it found when it came"
    assert runner.finished == {"old": continuation([1, 2, 3, 4], 3), "young": continuation([5, 6, 7, 8], 6)}


def test_one_that_gave_way_and_lost_blocks_computes_the_rest_again() -> None:
    runner = Runner(*BUCKETS, num_blocks=40)
    runner.scheduler.add(young := request("young", PROMPT, 8))
    for _ in range(4):
        runner.step()
    runner.scheduler.preempt(young)
    runner.scheduler.blocks.reserve("another", 28)  # what is left are the first 12
    runner.scheduler.blocks.free("another")
    # The rest of the prompt by an append, 3 tokens that it has generated by steps that sample nothing, and 4 more.
    assert steps(runner) == [[("young", 8)], *[[("young", 1)]] * 7]
    assert runner.finished == {"young": continuation(PROMPT, 8)}


def test_beams_begin_with_what_is_cached() -> None:
    runner = Runner([(1, 32)], [(4, 64)], [(1, 4, 64)], num_blocks=100, block_size=4)
    run(runner, "plain", PROMPT)
    search = beam_request("search", PROMPT, max_tokens=9, width=4)
    runner.scheduler.add(search)
    batch = runner.step()
    assert batch is not None
    assert (batch.pipeline.name, batch.counts, search.num_cached_tokens) == ("append-1x4x64", [4], 16)
    runner.run_all()
    assert runner.finished["search"] == best_beams(PROMPT, 9, width=4)


# Fairness


def arrivals(runner: Runner, long: Request, prompt: int, max_tokens: int) -> list[list[str]]:
    """Steps until `long` is finished; before each a short request comes in. Returns who ran in each."""
    ran = []
    runner.scheduler.add(long)
    while long.request_id not in runner.finished:
        number = len(ran)
        if runner.scheduler.num_unfinished < 8:
            tokens = [number * prompt + place for place in range(prompt)]
            runner.scheduler.add(request(f"short {number}", tokens, max_tokens))
        batch = runner.step()
        assert batch is not None
        ran.append([each.request_id for each in batch.requests])
        assert len(ran) < 1000, "it never ends"
    return ran


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_a_long_request_ends_under_a_stream_of_short_ones(max_tokens: int) -> None:
    """Those that end with their first token need no decode step and keep no place: they alone could go on for ever."""
    runner = Runner([(1, 8)], [(4, 96)], [(1, 8, 96)], num_blocks=400)
    long = request("long", 60, max_tokens=20)
    ran = arrivals(runner, long, 3, max_tokens)
    # 8 pieces, with at most one step of others between; then at most 4 prefills, as many as places, for each token.
    assert len(ran) <= 8 * 2 + 19 * 5
    assert sum("long" in names for names in ran) == 8 + 19


def test_a_decode_step_never_waits_for_more_than_a_piece_of_a_long_prompt() -> None:
    """Also where no chunk size is set: the prompt is longer than the largest prefill bucket."""
    runner = Runner([(1, 8)], [(4, 96)], [(1, 8, 96)], num_blocks=400)
    runner.scheduler.add(request("running", [1, 2], max_tokens=20))
    runner.step()
    runner.scheduler.add(request("long", range(10, 70), max_tokens=3))
    assert [[name for name, _ in step] for step in steps(runner)][:16] == [["long"], ["running"]] * 7 + [
        ["long"],
        ["long", "running"],
    ]


def test_waiting_long_prompts_are_not_overtaken_for_lack_of_blocks() -> None:
    runner = Runner([(1, 8)], [(4, 32)], [(1, 8, 32)], num_blocks=40)
    long = request("long", 30, max_tokens=2)
    runner.scheduler.add(request("before", 20, max_tokens=8))
    for _ in range(3):
        runner.step()
    ran = arrivals(runner, long, 2, 4)
    first = next(number for number, names in enumerate(ran) if any(name.startswith("short") for name in names))
    assert any("long" in names for names in ran[:first]), "no short one runs before it"
    assert len(ran) <= 24
