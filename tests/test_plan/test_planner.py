"""From a BuildSpec to steps: which there are, what they need, and which of them a change calls for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.ir.outline import Outline, RotaryLimit
from furiosa_build.plan.keys import key_factors, key_of
from furiosa_build.plan.model import ModelPlan
from furiosa_build.plan.resolved import pretrained_id
from furiosa_build.recipe.schema import BuildSpec, ModelSpec

from .outlines import DOWN, QUERY, model_plan, outline, plan, spec

# The steps


def test_steps_in_the_order_in_which_they_can_run() -> None:
    assert list(plan().steps) == [
        "fetch",
        "quantize",
        "partition:weights",
        "partition:prefill-1x32:first",
        "compile:prefill-1x32:first",
        "partition:prefill-1x32:block",
        "compile:prefill-1x32:block",
        "partition:prefill-1x32:last",
        "compile:prefill-1x32:last",
        "partition:decode-2x64:first",
        "compile:decode-2x64:first",
        "partition:decode-2x64:block",
        "compile:decode-2x64:block",
        "partition:decode-2x64:last",
        "compile:decode-2x64:last",
        "package",
        "qualify",
    ]


@pytest.mark.parametrize("scheme", ["none", "fp8", "int8"])
@pytest.mark.parametrize("sliding", [(), (1,)])
def test_a_step_needs_steps_that_come_before_it(scheme: str, sliding: tuple[int, ...]) -> None:
    steps = plan(spec(quantization={"scheme": scheme}), outline(sliding=sliding)).steps
    seen: set[str] = set()
    for name, step in steps.items():
        assert name == step.name
        assert seen.issuperset(step.needs)
        seen.add(name)


def test_needs() -> None:
    steps = plan(spec(quantization={"scheme": "int8"})).steps
    assert list(steps["fetch"].needs) == []
    assert steps["quantize"].needs == {"fetch": "weights.json"}
    assert list(steps["partition:weights"].needs) == ["quantize"]
    assert list(steps["partition:prefill-1x32:block"].needs) == [], "graphs are traced without weights"
    assert steps["compile:prefill-1x32:block"].needs == {"partition:prefill-1x32:block": "*"}
    compiled = {name for name in steps if name.startswith("compile")}
    assert compiled | {"fetch", "partition:weights"} <= set(steps["package"].needs)
    assert list(steps["qualify"].needs) == ["package", "fetch", "quantize"]


def test_without_quantization_the_weights_are_those_that_were_fetched() -> None:
    assert list(plan().steps["partition:weights"].needs) == ["fetch", "quantize"]


def test_every_step_has_one_line_of_description() -> None:
    described = {name: step.description for name, step in plan(spec(quantization={"scheme": "fp8"})).steps.items()}
    assert all(text and "\n" not in text and len(text) < 120 for text in described.values())
    assert described["fetch"] == "find the random weights from seed 0 of org/model and list them by digest"
    assert described["quantize"] == "quantize 6 weights to fp8"
    assert described["compile:decode-2x64:block"] == "compile block of decode-2x64 (3 layers) with eager for any"


def test_buckets() -> None:
    buckets = {
        "prefill_buckets": [[1, 32], [2, 64]],
        "append_buckets": [[1, 16, 128]],
        "decode_buckets": [[4, 128]],
    }
    shapes = {b.name: (b.phase, b.batch, b.query, b.context) for b in model_plan(spec(buckets=buckets)).buckets}
    assert shapes == {
        "prefill-1x32": ("prefill", 1, 32, 32),
        "prefill-2x64": ("prefill", 2, 64, 64),
        "append-1x16x128": ("append", 1, 16, 128),
        "decode-4x128": ("decode", 4, 1, 128),
    }


def test_decode_buckets_have_a_row_for_each_beam() -> None:
    shared = {"beam_width": 3, "max_new_tokens": 16}
    with_beams = model_plan(spec(buckets={"kv_cache_sharing_across_beams_config": shared}))
    assert [bucket.name for bucket in with_beams.buckets] == ["prefill-1x32", "decode-6x64"]


# Kinds


def kinds(of: ModelPlan) -> dict[str, tuple[int, ...]]:
    """Those of the first bucket: others have the same."""
    return {kind.name: kind.layers for kind in of.kinds[of.buckets[0]]}


def test_layers_of_one_graph_are_one_kind() -> None:
    assert kinds(model_plan(model=outline(layers=80))) == {"first": (), "block": tuple(range(80)), "last": ()}


def test_layers_of_other_graphs_are_other_kinds() -> None:
    found = kinds(model_plan(model=outline(layers=4, sliding=(0, 2))))
    assert found == {"first": (), "block0": (0, 2), "block1": (1, 3), "last": ()}


def test_schemes_differ_by_layer() -> None:
    rules = [{"match": "model.layers.1.*", "scheme": "fp8"}, {"match": "*mlp*", "scheme": "fp8"}]
    built = plan(spec(quantization={"scheme": "int8", "rules": rules}), outline(layers=3))
    assert kinds(built.model) == {"first": (), "block0": (0, 2), "block1": (1,), "last": ()}
    _, block0, block1, _ = built.model.kinds[built.model.buckets[0]]
    assert [dict(block.schemes) for block in block0.blocks] == [{QUERY: "int8", DOWN: "fp8"}]
    assert [dict(block.schemes) for block in block1.blocks] == [{QUERY: "fp8", DOWN: "fp8"}]
    assert built.model.quantization == "fp8+int8"
    assert built.steps["quantize"].description == "quantize 7 weights to fp8+int8"


def test_rules_on_some_layers_split_a_kind() -> None:
    rules = [{"match": "model.layers.1.mlp.*", "scheme": "none"}]
    built = plan(spec(quantization={"scheme": "int8", "rules": rules}), outline(layers=4))
    assert kinds(built.model) == {"first": (), "block0": (0, 2, 3), "block1": (1,), "last": ()}
    first, block0, block1, last = built.model.kinds[built.model.buckets[0]]
    assert first.schemes == {}
    assert [dict(block.schemes) for block in block0.blocks] == [{QUERY: "int8", DOWN: "int8"}]
    assert [dict(block.schemes) for block in block1.blocks] == [{QUERY: "int8"}]
    assert last.schemes == {"lm_head.weight": "int8"}
    assert {name for name in built.steps if name.startswith("compile:decode")} == {
        f"compile:decode-2x64:{kind}" for kind in ("first", "block0", "block1", "last")
    }


def test_only_linear_layers_are_quantized() -> None:
    built = plan(spec(quantization={"scheme": "fp8"}))
    assert built.model.schemes == {f"model.layers.{i}.{name}": "fp8" for name in (QUERY, DOWN) for i in range(3)}


# What a change calls for


SPEC, OUTLINE = spec(), outline()


@dataclass(frozen=True)
class Change:
    """Something else to build, or to build with."""

    spec: BuildSpec = SPEC
    outline: Outline = OUTLINE
    isa: str = "any"


def keys(change: Change) -> dict[str, str]:
    """Every step's key, as if the output of each differed whenever its key does: nothing is cut off early."""
    found: dict[str, str] = {}
    for step in plan(change.spec, change.outline, change.isa).steps.values():
        inputs = {needed: {"*": found[needed]} for needed in step.needs}
        found[step.name] = key_of(key_factors(step.action, step.reads, inputs, {}, {}))
    return found


ARTIFACT = {"package", "qualify"}
WEIGHTS = {"quantize", "partition:weights", *ARTIFACT}
BUCKETS = ("prefill-1x32", "decode-2x64")


def programs(*names: str, buckets: tuple[str, ...] = BUCKETS) -> set[str]:
    return {f"{step}:{bucket}:{kind}" for step in ("partition", "compile") for bucket in buckets for kind in names}


def compiles() -> set[str]:
    return {name for name in programs("first", "block", "last") if name.startswith("compile")}


CHANGES = {
    "nothing": (Change(), set()),
    "name": (Change(spec(name="other")), ARTIFACT),
    "scheduler": (Change(spec(scheduler={"max_processing_samples": 7})), ARTIFACT),
    "size of the KV cache": (Change(spec(buckets={"paged_attention_num_blocks": 2048})), ARTIFACT),
    "size of a KV block": (Change(spec(buckets={"paged_attention_block_size": 16})), ARTIFACT),
    "a target of the same instruction set": (Change(spec(target={"name": "other"})), ARTIFACT),
    "a bucket added": (
        Change(spec(buckets={"decode_buckets": [[2, 64], [4, 64]]})),
        programs("first", "block", "last", buckets=("decode-4x64",)) | ARTIFACT,
    ),
    "a bucket removed": (
        Change(spec(buckets={"decode_buckets": [[2, 128]]})),
        programs("first", "block", "last", buckets=("decode-2x128",)) | ARTIFACT,
    ),
    "more layers of the same kind": (Change(outline=outline(layers=5)), {"fetch", *WEIGHTS}),
    "another seed": (Change(spec(model={"seed_for_random_weight": 1})), {"fetch", *WEIGHTS}),
    "quantization": (Change(spec(quantization={"scheme": "int8"})), WEIGHTS | programs("block")),
    "quantization of the head alone": (
        Change(spec(quantization={"scheme": "int8", "rules": [{"match": "model*", "scheme": "none"}]})),
        WEIGHTS | programs("last"),
    ),
    "logits of the last token": (
        Change(spec(model={"calculate_logit_only_for_last_token": True})),
        programs("last") | ARTIFACT,
    ),
    "backend": (Change(spec(backend={"name": "inductor"})), compiles() | ARTIFACT),
    "instruction set": (Change(isa="x86-64-v4"), compiles() | ARTIFACT),
    "graph of a layer": (
        Change(
            outline=OUTLINE.model_copy(
                update={"blocks": [OUTLINE.blocks[0].model_copy(update={"signature": "another graph"})]}
            )
        ),
        programs("block") | ARTIFACT,
    ),
    "what the first supertask hands on": (
        Change(outline=OUTLINE.model_copy(update={"first_outputs": [(0, "mask"), (1, "mask")]})),
        programs("first") | ARTIFACT,
    ),
    "how a layer is wired": (
        Change(
            outline=OUTLINE.model_copy(
                update={"blocks": [OUTLINE.blocks[0].model_copy(update={"inputs": {"hidden_states": "other"}})]}
            )
        ),
        ARTIFACT,
    ),
    "class of the model": (Change(outline=OUTLINE.model_copy(update={"architecture": "Other"})), WEIGHTS),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_which_keys_a_change_changes(change: Change, expected: set[str]) -> None:
    before, after = keys(Change()), keys(change)
    assert {name for name, key in after.items() if before.get(name) != key} == expected


@pytest.mark.parametrize("longest", [63, 64])
def test_a_sequence_may_not_grow_to_where_its_rotary_tables_change(longest: int) -> None:
    limited = outline().model_copy(update={"rotary_limit": RotaryLimit(rope_type="longrope", longest=longest)})
    if longest == 64:  # as long as the longest bucket
        plan(model=limited)
        return
    with pytest.raises(UserError) as caught:
        plan(model=limited)
    assert str(caught.value) == (
        "rotary embedding of type 'longrope': beyond 63 tokens its tables depend on the length of the sequence, which "
        "is not supported, and the longest bucket has 64\n"
        "  where: buckets\n"
        "  valid: buckets of up to 63 tokens, where the tables are constant\n"
        "  hint: set buckets.max_seq_len_to_capture=63, and buckets that are no longer"
    )


def test_programs_do_not_depend_on_where_the_weights_come_from() -> None:
    at_random, from_hub = keys(Change()), keys(Change(spec(model={"seed_for_random_weight": None})))
    traced = programs("first", "block", "last")
    assert {name: at_random[name] for name in traced} == {name: from_hub[name] for name in traced}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("gpt2", "gpt2"),
        ("/home/somebody/models/tiny", "tiny"),
        ("examples/quickstart/model", "examples/quickstart/model"),
        ("./tiny", "tiny"),
        ("../tiny", "tiny"),
        ("~/tiny", "tiny"),
        (".", "."),
    ],
)
def test_a_model_is_named_without_directories_of_the_machine(given: str, expected: str) -> None:
    assert pretrained_id(ModelSpec(model_id_or_path=given)) == expected
