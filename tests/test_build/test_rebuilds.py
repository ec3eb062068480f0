"""What changes, and exactly which steps run: one row a case, built from one end to the other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest
from test_plan.source_tree import copied_package
from user_directory import (
    RANDOM,
    UserDirectory,
    make_built_directory,
    make_user_directory,
    steps_in_this_process,
)

from .changes import (
    DRAFT_BUCKETS,
    TOKENIZER,
    Change,
    after,
    comments,
    copy,
    draft,
    draft_built_alone,
    drafted,
    edit,
    edit_that_makes_others,
    field_of_config,
    model_file,
    more_layers,
    move,
    move_store,
    new_weights,
    of_draft,
    of_tokenizer,
    other_compiler,
    other_isa,
    other_order,
    other_surroundings,
    other_version,
    override,
    rewrite,
    secret_weights,
    touch,
)

BUCKETS = ("prefill-1x32", "decode-2x64")
KINDS = ("first", "block", "last")
WEIGHTS = ["quantize", "partition:weights"]
ARTIFACT = ["package", "qualify"]


def programs(*kinds: str, buckets: tuple[str, ...] = BUCKETS) -> list[str]:
    """Their partition and compile steps."""
    return [f"{step}:{bucket}:{kind}" for bucket in buckets for kind in kinds for step in ("partition", "compile")]


TRACES = [name for name in programs(*KINDS) if name.startswith("partition")]
COMPILES = [name for name in programs(*KINDS) if name.startswith("compile")]


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """A directory in which the recipe has been built. Not to be changed."""
    return make_built_directory(tmp_path_factory.mktemp("rebuilds"))


@pytest.fixture
def user(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """A directory in which the recipe has been built, to be changed."""
    shutil.copytree(built.store, tmp_path / "store")
    directory = make_user_directory(tmp_path / "user", tmp_path / "store", built.root / "tiny")
    assert directory.build() == []
    return directory


ROWS: Mapping[str, tuple[Change, list[str]]] = {
    "nothing": (override(), []),
    "comment": (rewrite(comments), []),
    "key order": (rewrite(other_order), []),
    "recipe, model and artifacts moved": (move, []),
    "other directory": (copy, []),
    "store moved": (move_store, []),
    "other HOME, TZ, locale": (other_surroundings, []),
    "where and how to build": (override("num_compile_workers=2", "save_dir=elsewhere"), []),
    "name": (override("name=other"), ARTIFACT),
    "scheduler configuration": (override("scheduler.spare_blocks_ratio=0.5"), ARTIFACT),
    "size of the KV cache": (override("buckets.paged_attention_num_blocks=64"), ARTIFACT),
    "one bucket added": (
        override("buckets.decode_buckets=[[2,64],[3,64]]"),
        [*programs(*KINDS, buckets=("decode-3x64",)), *ARTIFACT],
    ),
    "append buckets, derived": (
        override("buckets.append_buckets=null"),
        [*programs(*KINDS, buckets=("append-1x8x64",)), *ARTIFACT],
    ),
    "prompts in pieces": (
        override("scheduler.prefill_chunk_size=8", "buckets.append_buckets=null"),
        [*programs(*KINDS, buckets=("append-1x8x64",)), *ARTIFACT],
    ),
    "beams": (
        override("buckets.kv_cache_sharing_across_beams_config={beam_width:2,max_new_tokens:8}"),
        [*programs(*KINDS, buckets=("decode-4x64",)), *ARTIFACT],
    ),
    # It has what is its own made, and shares the rest with the model and with builds of itself alone.
    "a draft model": (
        after("buckets.append_buckets=null", then=draft()),
        [*of_draft(WEIGHTS), *programs(*KINDS, buckets=("append-2x5x64",)), *ARTIFACT],
    ),
    "a draft model that was built alone": (
        draft_built_alone,
        [*programs(*KINDS, buckets=("append-2x5x64",)), *ARTIFACT],
    ),
    "quantization of the draft": (
        drafted(draft(quantization="{scheme: int8}")),
        of_draft([*WEIGHTS, *programs("block", "last", buckets=DRAFT_BUCKETS)]) + ARTIFACT,
    ),
    "number of proposals": (
        drafted(override("speculative.num_speculative_tokens=2")),
        [*programs(*KINDS, buckets=("append-2x3x64",)), *ARTIFACT],
    ),
    "quantization of the model that has a draft": (
        drafted(override("quantization=int8")),
        [*WEIGHTS, *programs("block", buckets=(*DRAFT_BUCKETS, "append-2x5x64")), *ARTIFACT],
    ),
    "one bucket removed": (
        after("buckets.decode_buckets=[[2,64],[3,64]]", then=("buckets.decode_buckets=[[3,64]]",)),
        ARTIFACT,
    ),
    "new weights, same shapes": (new_weights, ["fetch", *WEIGHTS, *ARTIFACT]),
    "new random weights": (
        after(*RANDOM, then=("model.seed_for_random_weight=1",)),
        ["fetch", *WEIGHTS, *ARTIFACT],
    ),
    "quantization scheme": (override("quantization=int8"), [*WEIGHTS, *programs("block"), *ARTIFACT]),
    "quantization scheme, to another": (
        after("quantization=int8", then=("quantization=fp8",)),
        [*WEIGHTS, *programs("block"), *ARTIFACT],
    ),
    "a quantization rule that matches nothing": (
        override("quantization.rules=[{match: nothing, scheme: none}]"),
        ["package"],
    ),
    "more layers of the same kind": (more_layers, ["fetch", *WEIGHTS, *ARTIFACT]),
    "more random layers of the same kind": (
        after(*RANDOM, "model.num_hidden_layers=1", then=RANDOM),
        ["fetch", *WEIGHTS, *ARTIFACT],
    ),
    "fewer layers of the same weights": (override("model.num_hidden_layers=1"), [*WEIGHTS, *ARTIFACT]),
    "tokenizer": (model_file("tokenizer.json", TOKENIZER), ["fetch", *ARTIFACT]),
    "chat template": (of_tokenizer(model_file("chat_template.jinja", "{{ messages }}")), ["fetch", *ARTIFACT]),
    "white space in a tokenizer's file": (
        of_tokenizer(model_file("tokenizer.json", f"{TOKENIZER} \n")),
        ["fetch", *ARTIFACT],  # the artifact is the same; transformers is asked what it makes of the file
    ),
    "version of tokenizers, with a tokenizer": (of_tokenizer(other_version("tokenizers")), ["qualify"]),
    "no tokenizer any more": (of_tokenizer(override("model.tokenizer=none")), ARTIFACT),
    "a field of config.json that shapes no graph": (field_of_config, ["fetch", "quantize", *ARTIFACT]),
    "torch": (other_version("torch"), [*WEIGHTS, *TRACES, *ARTIFACT]),
    "transformers": (other_version("transformers"), [*TRACES, *ARTIFACT]),
    "numpy": (other_version("numpy"), [*WEIGHTS, *ARTIFACT]),
    "tokenizers": (other_version("tokenizers"), ["qualify"]),
    "pydantic": (other_version("pydantic"), []),
    "compiler": (other_compiler, [*COMPILES, "package"]),
    "target instruction set": (other_isa, [*COMPILES, *ARTIFACT]),
    "source of fetch": (edit("steps/fetch.py"), ["fetch"]),
    "source of quantize": (edit("steps/quantize.py"), ["quantize"]),
    "source of partition:weights": (edit("steps/shard.py"), ["partition:weights"]),
    "source of partition": (edit("steps/trace.py"), TRACES),
    "source of compile": (edit("steps/compile.py"), COMPILES),
    "source of package": (edit("steps/package.py"), ["package"]),
    "source of qualify": (edit("steps/qualify.py"), ["qualify"]),
    "source of the runtime": (edit("runtime/scheduling/scheduler.py"), ["qualify"]),
    "source of the backend": (edit("backends/eager.py"), [*COMPILES, "qualify"]),
    "source of another backend": (edit("backends/inductor/backend.py"), []),
    "source that no step runs": (edit("cli/main.py", "build/build.py", "ui/plan_text.py", "store/actions.py"), []),
    "source that makes other files": (edit_that_makes_others, ["partition:weights", *ARTIFACT]),
    "timestamps touched": (touch, []),
    "content changed with size and time kept": (secret_weights, ["fetch", *WEIGHTS, *ARTIFACT]),
    "nothing, --verify-inputs": (override("verify_inputs=true"), []),
}


EVERYDAY = {
    "nothing",
    "other HOME, TZ, locale",
    "scheduler configuration",
    "one bucket added",
    "a draft model that was built alone",
    "new weights, same shapes",
    "quantization scheme",
    "torch",
    "target instruction set",
    "source of partition",
    "source of the runtime",
    "content changed with size and time kept",
}
"""The rows that `make test` runs too: one for each way in which a build can depend on something."""


def test_rows_of_every_day_are_there() -> None:
    assert set(ROWS) >= EVERYDAY


@pytest.mark.parametrize(
    ("change", "expected"),
    [pytest.param(*row, id=name, marks=() if name in EVERYDAY else pytest.mark.grid) for name, row in ROWS.items()],
)
def test_what_a_change_runs(
    user: UserDirectory, tmp_path: Path, change: Change, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And `explain` tells so beforehand: what is surely to do, and what may be."""
    with copied_package(tmp_path / "source"):
        of, overrides = change(user, monkeypatch)
        with closing(of.open(*overrides)) as build:
            states = {one.step: one.state for one in build.explain()}
        ran = of.build(*overrides)
        assert sorted(ran) == sorted(expected)
        assert {step for step, state in states.items() if state == "to do"} <= set(ran)
        assert set(ran) <= {step for step, state in states.items() if state in ("to do", "waits")}
        assert of.build(*overrides) == []
