"""Which prompts an artifact is asked to continue."""

from __future__ import annotations

from typing import Any

import pytest

from furiosa_build.artifact.schema import Artifact
from furiosa_build.plan.budget.reference import LENGTHS
from furiosa_build.runtime.probe import Continuation
from furiosa_build.steps.qualification.questions import make_questions


def rounds(parameters: int = 1000, longest: int = LENGTHS[0], **buckets: Any) -> list[list[tuple[int, int]]]:
    """Lengths of the prompts of an artifact with these buckets, and how many tokens are to follow."""
    return [[(len(each.prompt), each.max_tokens) for each in one] for one in asked(parameters, longest, **buckets)]


def asked(parameters: int = 1000, longest: int = LENGTHS[0], **buckets: Any) -> list[list[Continuation]]:
    config = {
        "prefill_buckets": [(1, 64), (1, 256)],
        "append_buckets": [],
        "decode_buckets": [(1, 128), (4, 512)],
        "paged_attention_block_size": 16,
        "kv_cache_sharing_across_beams_config": None,
        **buckets,
    }
    artifact = Artifact.model_construct(
        generator_config=_Fields(config), model_metadata=_Fields({"num_parameters": parameters, "vocab_size": 1000})
    )
    return make_questions(artifact, None, longest).rounds


class _Fields:
    def __init__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)


SHORT = [(8, 16), (13, 16), (18, 16)]


def test_prompts_fill_the_buckets() -> None:
    """Without append buckets no prompt is longer than a prefill bucket."""
    assert rounds() == [SHORT, [(64, 4), (125, 4), (256, 4)]]


def test_prompts_in_pieces_lead_to_the_end_of_the_longest_bucket_and_some_begin_alike() -> None:
    long, again = asked(append_buckets=[(1, 64, 512), (1, 16, 512)])[1:]
    assert [len(each.prompt) for each in long] == [64, 125, 256, 509]
    assert [len(each.prompt) for each in again] == [496 + 13, 240 + 64]
    assert again[0].prompt[:496] == long[3].prompt[:496]
    assert again[1].prompt[:240] == long[2].prompt[:240]
    beginnings = [tuple(each.prompt[:16]) for each in long]
    assert len(set(beginnings)) == len(beginnings), "none of the others is found in the cache"


@pytest.mark.parametrize(("parameters", "lengths"), [(10**10, [64, 125, 256]), (5 * 10**10, [64, 125]), (10**12, [])])
def test_large_models_are_asked_less(parameters: int, lengths: list[int]) -> None:
    short, *others = rounds(parameters)
    assert short == SHORT
    assert [length for one in others for length, _ in one] == lengths


def test_where_memory_is_short_prompts_are() -> None:
    buckets = {"prefill_buckets": [(1, 2048)], "decode_buckets": [(1, 4096)]}
    assert rounds(**buckets)[1] == [(2048, 4)]
    assert rounds(longest=512, **buckets)[1] == [(512, 4)]


def test_beams() -> None:
    class Sharing:
        beam_width, max_new_tokens = 3, 8

    *_, last = asked(kv_cache_sharing_across_beams_config=Sharing())
    assert [(len(each.prompt), each.max_tokens, each.beams) for each in last] == [(8, 8, 3), (13, 8, 3), (18, 8, 3)]


def test_the_smallest_buckets_there_can_be() -> None:
    assert rounds(prefill_buckets=[(1, 1)], decode_buckets=[(1, 2)]) == [[(1, 2)] * 3, [(1, 2)]]
