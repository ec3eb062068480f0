from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_build.ir.sharding import Cut


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 5), st.sampled_from(["rows", "columns", "vocabulary"]))
def test_shares_are_equal_and_together_the_whole(ranks: int, share: int, other: int, how: str) -> None:
    cut = Cut(how=how)  # type: ignore[arg-type]
    shape = [other, ranks * share] if how == "columns" else [ranks * share, other]
    assert cut.fits(shape, ranks)
    shares = [cut.share(shape, ranks, rank) for rank in range(ranks)]
    assert [place for begin, length in shares for place in range(begin, begin + length)] == list(range(ranks * share))
    assert cut.local_shape(shape, ranks) == [share if i == cut.dim else n for i, n in enumerate(shape)]


@given(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8]), st.integers(1, 4))
def test_every_rank_has_the_key_value_heads_that_its_query_heads_read(ranks: int, heads: int, size: int) -> None:
    """With G query heads for each KV head, query head q reads KV head q // G."""
    cut, queries = Cut(how="heads", heads=heads), 16
    for rank in range(ranks):
        begin, length = cut.share([heads * size, 3], ranks, rank)
        own = range(rank * queries // ranks, (rank + 1) * queries // ranks)
        assert sorted({query // (queries // heads) for query in own}) == [
            head for head in range(heads) if begin <= head * size < begin + length
        ]


@pytest.mark.parametrize(
    ("cut", "shape", "ranks", "fits"),
    [
        (Cut(how="rows"), [6, 4], 4, False),
        (Cut(how="columns"), [6, 4], 4, True),
        (Cut(how="heads", heads=3), [12, 4], 2, False),
        (Cut(how="heads", heads=2), [12, 4], 8, True),
        (Cut(how="vocabulary"), [7, 4], 2, True),
        (Cut(how="once"), [7], 2, True),
    ],
)
def test_what_fits(cut: Cut, shape: list[int], ranks: int, fits: bool) -> None:
    assert cut.fits(shape, ranks) == fits


def test_a_vocabulary_that_cannot_be_shared_is_everywhere() -> None:
    assert Cut(how="vocabulary").share([7, 4], 2, 1) == (0, 7)
