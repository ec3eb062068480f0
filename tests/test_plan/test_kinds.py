"""How a pipeline is divided into supertasks, and which share a program."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from furiosa_build.ir.outline import Outline
from furiosa_build.plan.kinds import Kind, find_kinds
from furiosa_build.recipe.schema import RewritingSpec

from .outlines import outline

DEFAULT = RewritingSpec()


def kinds(
    of: Outline, stages: list[list[int]], rewriting: RewritingSpec = DEFAULT, slices: bool = False
) -> tuple[Kind, ...]:
    return find_kinds(of, {}, stages, rewriting, slices)


def uses(found: tuple[Kind, ...]) -> dict[str, list[tuple[int, ...]]]:
    return {kind.name: [use.layers for use in kind.uses] for kind in found}


def test_layers_run_one_by_one() -> None:
    assert uses(kinds(outline(3), [[0, 1, 2]])) == {"first": [()], "block": [(0,), (1,), (2,)], "last": [()]}


def test_layers_of_a_supertask_are_of_one_stage() -> None:
    found = kinds(outline(7), [[0, 1, 2, 3], [4, 5, 6]], RewritingSpec(num_blocks_per_supertask=2))
    assert uses(found) == {"first": [()], "block0": [(0, 1), (2, 3), (4, 5)], "block1": [(6,)], "last": [()]}
    assert [use.stage for use in found[1].uses] == [0, 0, 1]


def test_a_stage_in_one_piece() -> None:
    found = kinds(outline(6), [[0, 1], [2, 3], [4, 5]], RewritingSpec(use_blockwise_compile=False))
    assert uses(found) == {"stage0": [(0, 1)], "stage1": [(2, 3)], "stage2": [(4, 5)]}
    first, middle, last = (kind.segment for kind in found)
    assert (first.first, middle.first, last.first) == (True, False, False)
    assert (first.last, middle.last, last.last) == (False, False, True)
    assert first.outputs == ((0, "mask"),), "later stages are called with it"
    assert last.outputs == ()
    [whole] = kinds(outline(2), [[0, 1]], RewritingSpec(use_blockwise_compile=False))
    assert (whole.name, whole.segment.first, whole.segment.last, whole.segment.outputs) == ("stage", True, True, ())
    assert whole.sources == {}, "it makes for itself what its layers are called with"


def test_the_last_layer_alone_slices() -> None:
    found = kinds(outline(3), [[0, 1], [2]], slices=True)
    assert uses(found) == {"first": [()], "block": [(0,), (1,)], "last_block": [(2,)], "last": [()]}
    assert [(kind.segment.slices, kind.segment.is_sliced) for kind in found] == [
        (False, False),
        (False, False),
        (True, False),
        (False, True),
    ]


def test_layers_that_take_different_tensors_have_different_inputs() -> None:
    """A sliding layer's mask is another one than that of the layer before it."""
    found = kinds(outline(3, sliding=(1,)), [[0, 1, 2]], RewritingSpec(num_blocks_per_supertask=3))
    [block] = [kind for kind in found if kind.layers]
    full, sliding, again = block.segment.arguments
    assert full == again == {"hidden_states": "hidden_states", "mask": "mask"}
    assert sliding == {"hidden_states": "hidden_states", "mask": "1.mask"}
    assert block.sources == {
        "hidden_states": "hidden_states",
        "mask": "layers.0.mask",
        "1.mask": "layers.1.mask",
    }


def test_constants_make_every_supertask_its_own() -> None:
    found = kinds(outline(3), [[0, 1, 2]], RewritingSpec(embed_all_constants_into_graph=True))
    assert uses(found) == {"first": [()], "block0": [(0,)], "block1": [(1,)], "block2": [(2,)], "last": [()]}


@given(st.data())
def test_every_layer_runs_once_on_its_stage_in_order(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 12))
    sliding = data.draw(st.sets(st.integers(0, layers - 1)))
    ends = sorted({layers, *data.draw(st.sets(st.integers(1, layers), max_size=3))})
    stages = [list(range(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]
    blockwise = data.draw(st.booleans())
    rewriting = RewritingSpec(
        use_blockwise_compile=blockwise,
        num_blocks_per_supertask=data.draw(st.integers(1, 5)) if blockwise else 1,
        embed_all_constants_into_graph=data.draw(st.booleans()),
    )
    found = kinds(outline(layers, sliding=tuple(sliding)), stages, rewriting, data.draw(st.booleans()))
    supertasks = sorted((use for kind in found for use in kind.uses), key=lambda use: use.number)
    assert [use.number for use in supertasks] == list(range(len(supertasks)))
    assert [layer for use in supertasks for layer in use.layers] == list(range(layers))
    assert all(layer in stages[use.stage] for use in supertasks for layer in use.layers)
    assert len({kind.name for kind in found}) == len(found)
    shared = [kind for kind in found if len(kind.uses) > 1]
    assert not (shared and rewriting.embed_all_constants_into_graph)
    for kind in found:
        assert len({tuple(layer in sliding for layer in use.layers) for use in kind.uses}) == 1, "of the same kinds"
