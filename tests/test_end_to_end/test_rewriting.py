"""How the model is divided and rewritten changes the programs, and no token that they generate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import grid
from quantized import save_quantized
from test_models.tiny import GEMMA3, LLAMA
from torch.utils.flop_counter import FlopCounterMode
from user_directory import UserDirectory, furiosa_build, steps_in_this_process

from furiosa_build.artifact.schema import Artifact, Program
from furiosa_build.backends.core_aten import is_core
from furiosa_build.backends.graph import Graph
from furiosa_build.backends.graph_interpreter import GraphInterpreter
from furiosa_build.runtime import LLMEngine

from .tokens import expected_tokens, generated_tokens, make_users

SHAPE = {"num_hidden_layers": 5, "dtype": "float32", "eos_token_id": None}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, **SHAPE, "tie_word_embeddings": True},
    # Layers of two kinds, which take different rotary tables.
    "gemma": {**GEMMA3, **SHAPE, "layer_types": LAYER_TYPES},
}
PROMPTS = [[5, 9, 100], [3] * 11, [7, 8, 9, 10, 11, 12, 13], [50]]
NEW = 8
BUCKETS = ("buckets.prefill_buckets=[[1,16],[4,16]]", "buckets.decode_buckets=[[4,32]]")


@pytest.fixture(autouse=True, scope="module")
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> dict[str, UserDirectory]:
    return make_users(tmp_path_factory.mktemp("rewriting"), MODELS)


@pytest.fixture(scope="module")
def expected(users: dict[str, UserDirectory]) -> dict[str, list[list[int]]]:
    """model -> the tokens of transformers for every prompt."""
    return {name: expected_tokens(user, PROMPTS, NEW) for name, user in users.items()}


def build(user: UserDirectory, *overrides: str) -> Artifact:
    user.build(*BUCKETS, *overrides)
    return user.latest()


def generate(artifact: Path) -> list[list[int]]:
    with closing(LLMEngine(artifact, verify="full")) as engine:
        return generated_tokens(engine, PROMPTS, NEW)


def layers_of(artifact: Artifact, pipeline: str) -> list[tuple[str | None, list[int]]]:
    """Each supertask of a pipeline: its program, without the bucket's name, and its layers."""
    [found] = [each for each in artifact.pipelines if each.name == pipeline]
    return [((task.program or "").rpartition(".")[2], task.layers) for task in found.supertasks if task.program]


REWRITINGS = [
    ["num_blocks_per_supertask=1"],
    ["num_blocks_per_supertask=2"],
    ["num_blocks_per_supertask=5"],
    ["use_blockwise_compile=false"],
    ["add_prefill_last_block_slice=true"],
    ["add_prefill_last_block_slice=true", "num_blocks_per_supertask=3"],
    ["add_prefill_last_block_slice=true", "use_blockwise_compile=false"],
    ["do_decompositions_for_model_rewrite=true"],
    ["embed_all_constants_into_graph=true"],
    ["embed_all_constants_into_graph=true", "use_blockwise_compile=false"],
]


@pytest.mark.parametrize(
    ("overrides", "model", "stages"),
    [
        pytest.param(
            overrides,
            model,
            1 + (row + column) % 2,
            id="+".join([*overrides, model]),
            marks=() if column == row % len(MODELS) and row % 6 == 0 else pytest.mark.grid,
        )
        for row, overrides in enumerate(REWRITINGS)
        for column, model in enumerate(MODELS)
    ],
)
def test_the_same_tokens_as_transformers(
    users: dict[str, UserDirectory],
    expected: dict[str, list[list[int]]],
    overrides: list[str],
    model: str,
    stages: int,
) -> None:
    """Every rewriting with every model and with one and two stages, in turn: any two of the three meet."""
    last_token = ("model.calculate_logit_only_for_last_token=true",) if "slice" in overrides[0] else ()
    more = [f"rewriting.{override}" for override in overrides]
    artifact = users[model].package(*BUCKETS, *more, *last_token, f"parallel.pipeline_parallel_size={stages}")
    assert generate(artifact) == expected[model]


@pytest.mark.grid
@pytest.mark.parametrize("overrides", REWRITINGS[4:], ids="+".join)
def test_attention_of_its_own_gives_the_same_tokens_too(tmp_path: Path, overrides: list[str]) -> None:
    """ALiBi: masks and biases are handed from what comes before the layers to each of them."""
    model = {"model_type": "bloom", "hidden_size": 64, "n_head": 4, "n_layer": 3, "vocab_size": 192}
    user = make_users(tmp_path, {"bloom": {**model, **SHAPE, "num_hidden_layers": 3, "tie_word_embeddings": False}})[
        "bloom"
    ]
    last_token = ("model.calculate_logit_only_for_last_token=true",) if "slice" in overrides[0] else ()
    more = [f"rewriting.{override}" for override in overrides]
    artifact = user.package(*BUCKETS, *more, *last_token, "parallel.pipeline_parallel_size=2")
    assert generate(artifact) == expected_tokens(user, PROMPTS, NEW)


@pytest.mark.grid
@pytest.mark.parametrize(("ranks", "scheme"), [(1, "fp8"), (2, "int8")])
@pytest.mark.parametrize("model", MODELS)
def test_a_sliced_block_of_ranks_and_quantized_weights_is_the_whole_one(
    users: dict[str, UserDirectory], model: str, ranks: int, scheme: str
) -> None:
    overrides = [
        f"parallel.tensor_parallel_size={ranks}",
        f"quantization={scheme}",
        "model.calculate_logit_only_for_last_token=true",
    ]
    plain = generate(users[model].package(*BUCKETS, *overrides))
    sliced = users[model].package(*BUCKETS, *overrides, "rewriting.add_prefill_last_block_slice=true")
    assert generate(sliced) == plain


@pytest.mark.parametrize("form", ["int8", "fp8-tensor"])
def test_constants_of_a_checkpoint_that_is_quantized_already(
    users: dict[str, UserDirectory], tmp_path: Path, form: str
) -> None:
    checkpoint = save_quantized(users["llama"].root / "tiny", tmp_path / form, form)
    taken = (*BUCKETS, f"quantization.quantize_artifact_path={checkpoint}")
    plain = generate(users["llama"].package(*taken))
    assert generate(users["llama"].package(*taken, "rewriting.embed_all_constants_into_graph=true")) == plain


@pytest.mark.grid
@pytest.mark.parametrize("form", grid(["int8-plain-dynamic", "fp8-dynamic"], ["fp8-dynamic"]))
def test_rounded_activations_are_of_core_aten_too(users: dict[str, UserDirectory], tmp_path: Path, form: str) -> None:
    """Tokens may differ, where a number lies between two steps: qualify compares logits with transformers'."""
    checkpoint = save_quantized(users["llama"].root / "tiny", tmp_path / form, form)
    decomposed = "rewriting.do_decompositions_for_model_rewrite=true"
    artifact = build(users["llama"], f"quantization.quantize_artifact_path={checkpoint}", decomposed)
    assert artifact.model_metadata.quantization == form
    assert operators_outside_core_aten(users["llama"], artifact) == set()


@pytest.mark.grid
@pytest.mark.parametrize("chunk", grid([None, 5], [None]))
def test_prompts_in_pieces_have_their_last_block_sliced_too(
    users: dict[str, UserDirectory], expected: dict[str, list[list[int]]], chunk: int | None
) -> None:
    """What follows attention is for the last token of each piece."""
    build(
        users["gemma"],
        "rewriting.add_prefill_last_block_slice=true",
        "model.calculate_logit_only_for_last_token=true",
        "buckets.append_buckets=[[2,5,32]]",
        f"scheduler.prefill_chunk_size={'null' if chunk is None else chunk}",
    )
    assert layers_of(users["gemma"].latest(), "append-2x5x32")[-2:] == [("last_block", [4]), ("last", [])]
    assert generate(users["gemma"].artifacts / "latest") == expected["gemma"]


@pytest.mark.grid
def test_how_many_layers_share_a_program(users: dict[str, UserDirectory]) -> None:
    """Llama's layers are all alike; groups of as many layers are."""
    user, counts = users["llama"], {}
    for number in (1, 2, 5):
        artifact = build(user, f"rewriting.num_blocks_per_supertask={number}")
        assert artifact.model_rewriting_config.num_blocks_per_supertask == number
        counts[number] = layers_of(artifact, "decode-4x32")
    assert counts[1] == [("first", []), *(("block", [layer]) for layer in range(5)), ("last", [])]
    assert counts[2] == [("first", []), ("block0", [0, 1]), ("block0", [2, 3]), ("block1", [4]), ("last", [])]
    assert counts[5] == [("first", []), ("block", [0, 1, 2, 3, 4]), ("last", [])]

    artifact = build(user, "rewriting.use_blockwise_compile=false")
    assert layers_of(artifact, "decode-4x32") == [("stage", [0, 1, 2, 3, 4])]
    assert len(artifact.programs) == 3, "one a bucket"
    artifact = build(
        user,
        "rewriting.use_blockwise_compile=false",
        "parallel.pipeline_parallel_size=4",
        "parallel.num_blocks_per_pp_stage=[1,1,1,2]",
    )
    assert layers_of(artifact, "decode-4x32") == [("stage0", [0]), ("stage1", [1]), ("stage1", [2]), ("stage2", [3, 4])]


@pytest.mark.grid
def test_layers_of_different_kinds_share_a_program_where_their_sequence_is_the_same(
    users: dict[str, UserDirectory],
) -> None:
    """sliding, full | sliding, sliding | full: no two alike, and the first takes both rotary tables."""
    artifact = build(users["gemma"], "rewriting.num_blocks_per_supertask=2")
    names = [name for name, layers in layers_of(artifact, "decode-4x32") if layers]
    assert names == ["block0", "block1", "block2"]
    [first] = [program for program in artifact.programs.values() if program.kind == "block0"][:1]
    tables = [spec.name for spec in first.inputs if "position_embeddings" in spec.name]
    assert tables == [
        "position_embeddings.0",
        "position_embeddings.1",
        "1.position_embeddings.0",
        "1.position_embeddings.1",
    ]


def test_constants_are_in_the_programs_and_nowhere_else(users: dict[str, UserDirectory]) -> None:
    artifact = build(users["llama"], "rewriting.embed_all_constants_into_graph=true")
    assert [group.files for group in artifact.parameters] == [[]]
    assert list((users["llama"].artifacts / "latest").glob("params/*")) == []
    assert {spec.role for program in artifact.programs.values() for spec in program.inputs} == {
        "activation",
        "kv_cache",
    }
    assert [name for name, _ in layers_of(artifact, "decode-4x32")] == [
        "first",
        *(f"block{layer}" for layer in range(5)),
        "last",
    ]
    for key, words in {
        "parallel.tensor_parallel_size=2": ["the ranks have different constants", "embed_all_constants_into_graph"],
    }.items():
        ran = furiosa_build(users["llama"], "build", "tiny", "rewriting.embed_all_constants_into_graph=true", key)
        assert ran.status == 2
        assert [word for word in words if word not in ran.err] == []


@pytest.mark.grid
def test_decomposed_graphs_call_core_aten_only(users: dict[str, UserDirectory]) -> None:
    for scheme in ("none", "int8", "fp8"):
        key = f"quantization={scheme}"
        plain = build(users["llama"], key)
        assert operators_outside_core_aten(users["llama"], plain)
        decomposed = build(users["llama"], key, "rewriting.do_decompositions_for_model_rewrite=true")
        assert operators_outside_core_aten(users["llama"], decomposed) == set()


def test_the_last_block_does_less_work_in_prefill(users: dict[str, UserDirectory]) -> None:
    """Products behind attention are for one token and not for 16; keys and values are those of all tokens."""
    last_token = "model.calculate_logit_only_for_last_token=true"
    plain = build(users["llama"], last_token)
    artifact = build(users["llama"], last_token, "rewriting.add_prefill_last_block_slice=true")
    assert artifact.model_rewriting_config.add_prefill_last_block_slice
    assert layers_of(artifact, "decode-4x32") == layers_of(plain, "decode-4x32")
    assert layers_of(artifact, "prefill-4x16")[-2:] == [("last_block", [4]), ("last", [])]

    def products(name: str) -> int:
        [program] = [p for key, p in artifact.programs.items() if key == f"prefill-4x16.{name}"]
        return multiplications(graph_of(users["llama"], program))

    usual, sliced = products("block"), products("last_block")
    size = LLAMA["hidden_size"]
    kv = size * LLAMA["num_key_value_heads"] // LLAMA["num_attention_heads"]
    assert usual == 4 * 16 * size * (2 * size + 2 * kv + 3 * LLAMA["intermediate_size"])
    # Keys and values of all tokens, and of the last one again.
    expected = 4 * 16 * size * 2 * kv + 4 * size * (2 * size + 3 * LLAMA["intermediate_size"])
    assert sliced == expected
    assert sliced < usual / 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["rewriting.num_blocks_per_supertask=2", "rewriting.use_blockwise_compile=false"],
            ["num_blocks_per_supertask=2: a stage is one program", "use_blockwise_compile=true"],
        ),
        (
            ["rewriting.add_prefill_last_block_slice=true"],
            ["leaves the logits of the last token only", "model.calculate_logit_only_for_last_token=true"],
        ),
        (["rewriting.num_blocks_per_supertask=0"], ["num_blocks_per_supertask", "at least 1"]),
    ],
)
def test_what_contradicts_itself_is_refused(
    users: dict[str, UserDirectory], overrides: list[str], words: list[str]
) -> None:
    ran = furiosa_build(users["llama"], "build", "tiny", *overrides, "name=refused")
    assert ran.status == 2
    assert [word for word in words if word not in ran.err] == []
    assert not (users["llama"].root / "artifacts" / "refused").exists()


def operators_outside_core_aten(user: UserDirectory, artifact: Artifact) -> set[str]:
    return {
        call.op
        for program in artifact.programs.values()
        for call in graph_of(user, program).data.nodes
        if not call.op.startswith("operator.") and not is_core(resolve(call.op))
    }


def graph_of(user: UserDirectory, program: Program) -> Graph:
    return Graph.from_json((user.artifacts / "latest" / program.file).read_bytes())


def resolve(op: str) -> torch._ops.OpOverload:
    namespace, name, overload = op.split(".")
    found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return found


def multiplications(graph: Graph) -> int:
    """Of products with weights, by torch's own count."""
    inputs = [
        torch.zeros([40 if n is None else n for n in spec.shape], dtype=getattr(torch, spec.dtype))
        for spec in graph.inputs
    ]
    with FlopCounterMode(display=False) as counter:
        GraphInterpreter(graph)(*inputs)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if op in _PRODUCTS) // 2


_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)
