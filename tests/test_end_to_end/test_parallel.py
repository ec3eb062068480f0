"""Ranks, stages and replicas: the same tokens as transformers, whatever the model is divided into."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from grid import grid
from test_models.tiny import LLAMA, QWEN3
from user_directory import UserDirectory, furiosa_build, steps_in_this_process

from furiosa_build.artifact.reader import open_artifact
from furiosa_build.core.errors import UserError
from furiosa_build.recipe.schema import Scheme
from furiosa_build.runtime import EngineArgs, LLMEngine, SamplingParams

from .tokens import expected_tokens, generated_tokens, make_users

SHAPE = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "vocab_size": 192,
    "dtype": "float32",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, **SHAPE, "tie_word_embeddings": False},
    "qwen3": {**QWEN3, **SHAPE},
    "tied": {**LLAMA, **SHAPE, "tie_word_embeddings": True, "vocab_size": 190},
}
PROMPTS = [[5, 9, 101], [3] * 11, [7, 8, 9, 10, 11, 12, 13], [1, 2], [100, 101, 102, 103], [50]]
NEW = 10
SCHEMES: tuple[Scheme, ...] = ("none", "int8")

SETTINGS = ((1, 2, 4, 8), (1, 2, 3), (1, 2), tuple(MODELS), SCHEMES, (1, 2))
"""What there is of ranks, stages, replicas, models, quantization schemes and blocks in a supertask."""
GRID = list(itertools.product(*SETTINGS[:3]))
EVERY = 1 if os.environ.get("FURIOSA_TEST_FULL_GRID") else 4
CASES = [
    case
    for case in itertools.product(*SETTINGS)
    if sum(values.index(value) for values, value in zip(SETTINGS, case, strict=True)) % EVERY == 0
]
"""A fourth of all combinations, in which any three values of three settings meet: what fails in no other way than by
four certain values at once is found with FURIOSA_TEST_FULL_GRID=1 only."""
EVERYDAY = [
    (2, 1, 1, "qwen3", "int8", 2),
    (4, 2, 2, "llama", "none", 1),
    (1, 3, 1, "tied", "none", 1),
    (8, 2, 2, "tied", "int8", 1),
]
"""Cases with every value of every setting."""


@pytest.fixture(autouse=True, scope="module")
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> dict[str, UserDirectory]:
    return make_users(tmp_path_factory.mktemp("parallel"), MODELS)


@pytest.fixture(scope="module")
def expected(users: dict[str, UserDirectory]) -> dict[tuple[str, str], list[list[int]]]:
    """(model, scheme) -> the tokens of transformers for every prompt."""
    return {
        (name, scheme): expected_tokens(user, PROMPTS, NEW, scheme)
        for name, user in users.items()
        for scheme in SCHEMES
    }


def overrides(tp: int, pp: int, dp: int, *more: str) -> tuple[str, ...]:
    return (
        f"parallel.tensor_parallel_size={tp}",
        f"parallel.pipeline_parallel_size={pp}",
        f"parallel.data_parallel_size={dp}",
        *more,
    )


@pytest.mark.parametrize(("tp", "pp", "dp", "model", "scheme", "blocks"), grid(CASES, EVERYDAY))
def test_the_same_tokens_as_transformers(
    users: dict[str, UserDirectory],
    expected: dict[tuple[str, str], list[list[int]]],
    tp: int,
    pp: int,
    dp: int,
    model: str,
    scheme: str,
    blocks: int,
) -> None:
    supertasks = f"rewriting.num_blocks_per_supertask={blocks}"
    artifact = users[model].package(*overrides(tp, pp, dp, f"quantization={scheme}", supertasks))
    with closing(LLMEngine(artifact, verify="full")) as engine:
        assert generated_tokens(engine, PROMPTS, NEW) == expected[model, scheme]


def test_any_three_values_of_three_settings_meet() -> None:
    assert len(CASES) * EVERY == math.prod(map(len, SETTINGS))
    for three in itertools.combinations(range(len(SETTINGS)), 3):
        met = {tuple(case[i] for i in three) for case in CASES}
        assert met == set(itertools.product(*(SETTINGS[i] for i in three)))
    assert set(EVERYDAY) <= set(CASES)
    assert [set(values) for values in zip(*EVERYDAY, strict=True)] == [set(values) for values in SETTINGS]


@pytest.mark.grid
def test_a_cut_layer_adds_the_programs_between_its_collectives_and_no_more(users: dict[str, UserDirectory]) -> None:
    """And the ranks, stages and replicas share them all."""
    counts = {}
    for shape in GRID:
        counts[shape] = len(open_artifact(users["llama"].package(*overrides(*shape))).artifact.programs)
    whole = counts[1, 1, 1]
    assert {counts[1, pp, dp] for pp in (1, 2, 3) for dp in (1, 2)} == {whole}
    # Each bucket's layer is cut at two all-reduces.
    assert {count for (tp, _, _), count in counts.items() if tp > 1} == {whole + 2 * 2}


def test_every_rank_has_its_own_parameters_and_together_they_are_the_model(users: dict[str, UserDirectory]) -> None:
    from safetensors.torch import load_file

    user = users["llama"]
    user.build(*overrides(4, 2, 1))
    opened = open_artifact(user.artifacts / "latest", verify="full")
    of = {
        (group.stage, group.rank): {
            name: tensor for file in group.files for name, tensor in load_file(opened.path(file)).items()
        }
        for group in opened.artifact.parameters
    }
    assert sorted(of) == [(stage, rank) for stage in range(2) for rank in range(4)]
    whole = load_file(user.root / "tiny" / "model.safetensors")
    layer = "model.layers.1."
    for name, dim in {"mlp.up_proj": 0, "mlp.down_proj": 1, "self_attn.q_proj": 0, "self_attn.o_proj": 1}.items():
        parts = [of[0, rank][f"{layer}{name}.weight"] for rank in range(4)]
        torch.testing.assert_close(torch.cat(parts, dim), whole[f"{layer}{name}.weight"], rtol=0, atol=0)
    keys = whole[f"{layer}self_attn.k_proj.weight"]
    assert [
        torch.equal(of[0, rank][f"{layer}self_attn.k_proj.weight"], keys[8 * (rank // 2) :][:8]) for rank in range(4)
    ] == [True] * 4
    assert "model.layers.2.mlp.up_proj.weight" not in of[0, 0]
    assert "model.layers.2.mlp.up_proj.weight" in of[1, 0]
    assert "model.embed_tokens.weight" not in of[1, 0]


def test_threads_end_with_an_engine_that_nobody_closes(users: dict[str, UserDirectory]) -> None:
    user = users["llama"]
    user.build(*overrides(2, 1, 1))
    engine = LLMEngine(user.artifacts / "latest")
    threads = [thread for replica in engine._replicas for thread in replica.executor._threads]
    assert len(threads) == 2
    del engine
    gc.collect()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


ABANDON = """
import sys
from furiosa_build.runtime import LLMEngine
from furiosa_build.runtime.execution.input_buffers import Row
engine = LLMEngine(sys.argv[1])
for replica in engine._replicas:
    for _ in range(20):
        replica.executor.submit("prefill-1x32", [Row([5] * 30, 0, list(range(30)))])
if sys.argv[2] == "dropped":
    del engine, replica
"""


@pytest.mark.parametrize("engine", grid(["kept", "dropped"], ["kept"]))
def test_a_process_may_end_while_batches_are_under_way(users: dict[str, UserDirectory], engine: str) -> None:
    """A thread that computes when the interpreter is gone would take the process down with it."""
    artifact = users["llama"].package(*overrides(2, 1, 2))
    ran = subprocess.run([sys.executable, "-c", ABANDON, artifact, engine], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.grid
def test_stages_work_at_the_same_time(users: dict[str, UserDirectory]) -> None:
    """As many batches as `npu_queue_limit` says are in flight, and no request is in two of them."""
    user = users["llama"]
    for limit in (1, 2, 3):
        user.build(*overrides(1, 3, 1, f"scheduler.npu_queue_limit={limit}", "buckets.decode_buckets=[[2,64],[6,64]]"))
        with closing(LLMEngine(user.artifacts / "latest")) as engine:
            seen = 0
            for i, prompt in enumerate(PROMPTS):
                engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True))
            while engine.has_unfinished_requests():
                [replica] = engine._replicas
                replica.fill()
                batches = [batch for batch, _ in replica.in_flight]
                names = [request.request_id for batch in batches for request in batch.requests]
                assert len(names) == len(set(names))
                seen = max(seen, len(batches))
                engine.step()
            assert seen == limit


def test_replicas_share_the_requests(users: dict[str, UserDirectory]) -> None:
    user = users["llama"]
    user.build(*overrides(1, 1, 2))
    with closing(LLMEngine(user.artifacts / "latest")) as engine:
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(str(i), prompt, SamplingParams(max_tokens=2))
        assert [replica.scheduler.num_unfinished for replica in engine._replicas] == [3, 3]
        first, second = (replica.executor._runners[0].parameters for replica in engine._replicas)
        assert first["model.norm.weight"].data_ptr() == second["model.norm.weight"].data_ptr(), "mapped once"
        engine.step()
        engine.abort_request(["0", "1", "2", "3", "4", "5"])
        engine.check_integrity()


@pytest.mark.parametrize(("built", "loaded"), [(1, 2), (1, 3), (2, 1), (2, 2), (3, 2)])
def test_stages_are_divided_anew_at_load(
    users: dict[str, UserDirectory], expected: dict[tuple[str, str], list[list[int]]], built: int, loaded: int
) -> None:
    """As if the artifact had been built so. `tied`: the first and the last stage have a parameter in common."""
    user = users["tied"]
    user.build(*overrides(2, loaded, 1))
    as_built = user.latest()
    user.build(*overrides(2, built, 1))
    args = EngineArgs(model=str(user.artifacts / "latest"), pipeline_parallel_size=loaded)
    with closing(LLMEngine.from_engine_args(args)) as engine:
        assert engine.artifact.parallel_config == as_built.parallel_config
        assert engine.artifact.pipelines == as_built.pipelines
        assert engine.artifact.kv_cache == as_built.kv_cache
        assert len(engine._replicas[0].executor._runners) == 2 * loaded
        assert generated_tokens(engine, PROMPTS, NEW) == expected["tied", "none"]


@pytest.mark.grid
def test_a_program_is_not_divided_at_load(users: dict[str, UserDirectory]) -> None:
    user = users["llama"]
    user.build("rewriting.use_blockwise_compile=false", "parallel.pipeline_parallel_size=3")
    model = str(user.artifacts / "latest")
    with closing(LLMEngine.from_engine_args(EngineArgs(model=model, pipeline_parallel_size=1))) as engine:
        assert engine.artifact.parallel_config.pipeline_parallel_size == 1
    user.build("rewriting.use_blockwise_compile=false")
    with pytest.raises(UserError, match="has layers 0 to 2, which 2 stages would divide"):
        EngineArgs(model=str(user.artifacts / "latest"), pipeline_parallel_size=2).open()


PROCESS = """
import json, sys
import torch.distributed as dist
from furiosa_build.runtime import LLMEngine, SamplingParams
from furiosa_build.runtime.execution.communicator import DistributedCommunicator
artifact, (stages, ranks, prompts, new) = sys.argv[1], map(json.loads, sys.argv[2:])
dist.init_process_group("gloo")
engine = LLMEngine(artifact, seed=0, communicator=DistributedCommunicator(stages, ranks))
for i, prompt in enumerate(prompts):
    engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))
found = {}
while engine.has_unfinished_requests():
    for output in engine.step():
        if output.finished:
            found[output.request_id] = list(output.outputs[0].token_ids)
print(json.dumps([found[str(i)] for i in range(len(prompts))]))
dist.destroy_process_group()
"""


@pytest.mark.grid
@pytest.mark.parametrize(("ranks", "stages"), [(4, 1), (2, 2)])
def test_the_same_artifact_runs_with_a_process_for_each_rank(
    users: dict[str, UserDirectory], expected: dict[tuple[str, str], list[list[int]]], ranks: int, stages: int
) -> None:
    user = users["llama"]
    user.build(*overrides(ranks, stages, 1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}
    arguments = [str(user.artifacts / "latest"), str(stages), str(ranks), json.dumps(PROMPTS), str(NEW)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *arguments],
            env={**os.environ, **shared, "RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1]) == expected["llama", "none"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (overrides(3, 1, 1), ["tensor_parallel_size=3 does not divide the 8 attention heads", "valid: 1, 2, 4, 8"]),
        (overrides(16, 1, 1), ["tensor_parallel_size=16 does not divide the 8 attention heads"]),
        (overrides(1, 4, 1), ["pipeline_parallel_size=4 is more than the model's 3 layers", "valid: 1 to 3"]),
        (
            overrides(4, 3, 1, "devices='npu:0:*'", "target=rngd"),
            ["are 8 elements; 4 ranks x 3 stages x 1 replicas = 12 elements"],
        ),
        (
            ["parallel.data_parallel_size=5", "parallel.tensor_parallel_size=2", "devices='npu:0:*'", "target=rngd"],
            [
                "are 8 elements; 2 ranks x 1 stages x 5 replicas = 10 elements",
                "where: command line: parallel.data_parallel_size=5",
                "valid: at most 8 in all",
            ],
        ),
        (overrides(1, 1, 1, "devices=npu:0:8", "target=rngd"), ["'npu:0:8' is not there", "elements 0 to 7"]),
        (overrides(1, 1, 1, "devices='npu:0:0-3,npu:0:3'", "target=rngd"), ["names npu:0:3 twice"]),
        (overrides(1, 1, 1, "devices=cuda:0"), ["backend 'eager' does not compile for devices='cuda:0'"]),
        (
            ["model.model_id_or_path=odd", "model.seed_for_random_weight=0", "parallel.tensor_parallel_size=8"],
            ["tensor_parallel_size=8 does not divide the intermediate size 92", "valid: 1, 2, 4\n"],
        ),
        (
            [*overrides(1, 2, 1), "parallel.num_blocks_per_pp_stage=[1,1]"],
            ["num_blocks_per_pp_stage=[1, 1]: 2 stages of 2 layers in all", "valid: 2 numbers, 3 in all"],
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_before_any_work(
    users: dict[str, UserDirectory], wrong: tuple[str, ...], words: list[str]
) -> None:
    odd = users["llama"].root / "odd"
    odd.mkdir(exist_ok=True)
    (odd / "config.json").write_text(json.dumps({**MODELS["llama"], "intermediate_size": 92}))
    ran = furiosa_build(users["llama"], "build", "tiny", *wrong, "name=refused")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.count("error: ") == 1
    assert [word for word in words if word not in ran.err] == []
    assert not (users["llama"].root / "artifacts" / "refused").exists()


def test_elements_of_an_npu_are_emulated_and_said_to_be(users: dict[str, UserDirectory]) -> None:
    user = users["llama"]
    user.build("devices='npu:0:*'", "target=rngd", "parallel.tensor_parallel_size=4")
    assert user.latest().parallel_config.data_parallel_size == 2
    for command in (
        ["plan", "tiny", "devices='npu:0:*'", "target=rngd", "parallel.tensor_parallel_size=4"],
        ["inspect", "artifacts/tiny/latest"],
    ):
        shown = furiosa_build(user, *command).out
        assert "emulated on the host" in shown
        assert "npu:0:7" in shown
