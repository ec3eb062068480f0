"""ArtifactBuilder: the API's arguments, with the API's defaults, and the same artifact as the other faces make."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from quantized import save_quantized
from test_end_to_end.test_parallel import MODELS
from test_models.tiny import save_random_model
from user_directory import UserDirectory, make_user_directory, steps_in_this_process

from furiosa_build.artifact.builder import ArtifactBuilder
from furiosa_build.artifact.reader import open_artifact
from furiosa_build.artifact.schema import Artifact, KvCacheSharing
from furiosa_build.cli import furiosa_llm
from furiosa_build.core.errors import BuildError, PreflightError, UserError
from furiosa_build.models.config_types import KvCacheSharingAcrossBeamsConfig, SchedulerConfig
from furiosa_build.recipe.compose import validate
from furiosa_build.recipe.schema import RewritingSpec
from furiosa_build.runtime import LLM, SamplingParams

BUCKETS: dict[str, Any] = {
    "prefill_buckets": [(1, 32)],
    "decode_buckets": [(2, 64), (1, 64)],
    "max_seq_len_to_capture": 64,
}


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """A directory with a model of 8 heads, and a store."""
    root = tmp_path_factory.mktemp("builder")
    model = save_random_model(MODELS["llama"], root / "m" / "tiny")
    return make_user_directory(root / "user", root / "store", model)


def builder(user: UserDirectory, devices: str | list[str] = "cpu", **arguments: Any) -> ArtifactBuilder:
    given = {"tensor_parallel_size": 1, "backend": "eager", **BUCKETS, **arguments}
    return ArtifactBuilder(str(user.root / "tiny"), devices, **given)


def built(user: UserDirectory, save_dir: Path, devices: str | list[str] = "cpu", **arguments: Any) -> Artifact:
    builder(user, devices, **arguments).build(save_dir, cache_dir=user.store)
    return open_artifact(save_dir, verify="full").artifact


# The signature


def test_the_arguments_are_those_of_the_api_with_its_defaults() -> None:
    """From furiosa-artifact-builder-api.txt. An empty sequence may be a tuple; 2048 is as far as the model goes."""
    signature = inspect.signature(ArtifactBuilder.__init__)
    defaults = {name: p.default for name, p in signature.parameters.items() if name not in ("self", "kwargs")}
    nothing = inspect.Parameter.empty
    assert defaults == {
        "model_id_or_path": nothing,
        "devices": nothing,
        "name": "",
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 1,
        "data_parallel_size": None,
        "prefill_buckets": (),
        "decode_buckets": (),
        "max_seq_len_to_capture": None,
        "num_hidden_layers": None,
        "seed_for_random_weight": None,
        "calculate_logit_only_for_last_token": None,
        "quantize_artifact_path": None,
        "compiler_config_overrides": None,
        "do_decompositions_for_model_rewrite": False,
        "use_blockwise_compile": True,
        "num_blocks_per_supertask": 1,
        "num_blocks_per_pp_stage": None,
        "embed_all_constants_into_graph": False,
        "add_prefill_last_block_slice": False,
        "kv_cache_sharing_across_beams_config": None,
        "paged_attention_num_blocks": None,
        "paged_attention_block_size": 1,
        "default_scheduler_config": SchedulerConfig(
            npu_queue_limit=2,
            max_processing_samples=65536,
            spare_blocks_ratio=0.2,
            is_offline=False,
            prefill_chunk_size=None,
        ),
    }
    build = inspect.signature(ArtifactBuilder.build)
    assert {name: p.default for name, p in build.parameters.items() if name not in ("self", "kwargs")} == {
        "save_dir": nothing,
        "num_pipeline_builder_workers": 1,
        "num_compile_workers": 1,
        "cache_dir": Path("~/.cache/furiosa/llm"),
        "param_file_path": None,
        "param_saved_format": "safetensors",
        "_cleanup": True,
    }


# What the arguments do


def by_recipe(user: UserDirectory, name: str, *overrides: str) -> Artifact:
    user.build(f"name={name}", "buckets.append_buckets=null", "buckets.paged_attention_block_size=1", *overrides)
    return open_artifact(user.root / "artifacts" / name / "latest").artifact


def by_command(user: UserDirectory, save_dir: Path, name: str, *arguments: str) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FURIOSA_BUILD_CACHE", str(user.store))
        with pytest.raises(SystemExit) as ended:
            furiosa_llm.main(
                [
                    *["build", str(save_dir), "--model-id", str(user.root / "tiny"), "--name", name],
                    *["--devices", "cpu", "-tp", "1", "-pb", "1,32", "-db", "1,64", "--max-seq-len-to-capture", "64"],
                    *["--additional-model-config", "backend=eager", *arguments],
                ]
            )
    assert ended.value.code == 0
    return open_artifact(save_dir).artifact


def test_three_faces_make_one_artifact(user: UserDirectory, tmp_path: Path) -> None:
    python = built(user, tmp_path / "python", name="same", paged_attention_num_blocks=256)
    both = ("buckets.decode_buckets=[[1,64],[2,64]]", "buckets.paged_attention_num_blocks=256")
    recipe = by_recipe(user, "same", *both)
    command = by_command(user, tmp_path / "cli", "same", "-db", "2,64", "--paged-attention-num-blocks", "256")
    assert python.model_dump() == {**recipe.model_dump(), "metadata": python.metadata.model_dump()}
    assert python.metadata.artifact_id == recipe.metadata.artifact_id == command.metadata.artifact_id


def test_three_faces_take_one_quantized_checkpoint(user: UserDirectory, tmp_path: Path) -> None:
    checkpoint = save_quantized(user.root / "tiny", tmp_path / "quantized", "int8-plain-dynamic")
    buckets = {"prefill_buckets": [(1, 32)], "decode_buckets": [(1, 64)]}
    path = {"quantize_artifact_path": checkpoint}
    python = built(user, tmp_path / "python", name="taken", paged_attention_num_blocks=64, **buckets, **path)
    assert python.model_metadata.quantization == "int8-plain-dynamic"
    recipe = by_recipe(
        user,
        "taken",
        "buckets.decode_buckets=[[1,64]]",
        "buckets.paged_attention_num_blocks=64",
        f"quantization.quantize_artifact_path={checkpoint}",
    )
    taken = ("--paged-attention-num-blocks", "64", "--quantization-artifact-path", str(checkpoint))
    command = by_command(user, tmp_path / "cli", "taken", *taken)
    assert python.metadata.artifact_id == recipe.metadata.artifact_id == command.metadata.artifact_id


@pytest.mark.parametrize(
    ("devices", "arguments", "replicas"),
    [
        pytest.param("npu:0", {"tensor_parallel_size": 8}, 1, marks=pytest.mark.grid),
        pytest.param("npu:0:0-3", {"tensor_parallel_size": 2}, 2, marks=pytest.mark.grid),
        (["npu:0:0-1", "npu:1:4-5"], {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 1),
        pytest.param("npu:0:*,npu:1:*", {"tensor_parallel_size": 4}, 4, marks=pytest.mark.grid),
        ("npu:0:*", {"tensor_parallel_size": 2, "data_parallel_size": 3}, 3),
        ("cpu", {"tensor_parallel_size": 2}, 1),
        ("cpu:1", {"tensor_parallel_size": 1, "data_parallel_size": 2}, 2),
    ],
)
def test_replicas_follow_from_the_elements(
    user: UserDirectory, tmp_path: Path, devices: str | list[str], arguments: dict[str, int], replicas: int
) -> None:
    artifact = built(user, tmp_path, devices, **arguments)
    assert artifact.parallel_config.data_parallel_size == replicas
    assert artifact.devices == (devices if isinstance(devices, str) else ",".join(devices))


def test_without_buckets_there_is_one_of_each_of_the_longest_sequence(user: UserDirectory, tmp_path: Path) -> None:
    config = built(user, tmp_path, prefill_buckets=[], decode_buckets=[], max_seq_len_to_capture=24).generator_config
    assert (config.prefill_buckets, config.decode_buckets) == ([(1, 24)], [(1, 24)])


def test_beams_multiply_the_decode_batches(user: UserDirectory, tmp_path: Path) -> None:
    """By all faces alike. Blocks of one token: a prompt of 48 tokens and 4 beams of 16 for each of 2 searches."""
    shared = KvCacheSharingAcrossBeamsConfig(4, 16)
    artifact = built(user, tmp_path / "python", name="beams", kv_cache_sharing_across_beams_config=shared)
    config = artifact.generator_config
    assert config.decode_buckets == [(4, 64), (8, 64)]
    assert [p.batch_size for p in artifact.pipelines if p.phase == "decode"] == [4, 8]
    assert config.kv_cache_sharing_across_beams_config == KvCacheSharing(beam_width=4, max_new_tokens=16)
    assert config.paged_attention_num_blocks == 2 * (48 + 4 * 16)
    beams = "buckets.kv_cache_sharing_across_beams_config={beam_width: 4, max_new_tokens: 16}"
    recipe = by_recipe(user, "beams", "buckets.decode_buckets=[[1,64],[2,64]]", beams)
    sharing = ("--kv-cache-sharing-across-beams-config", "4,16")
    command = by_command(user, tmp_path / "cli", "beams", "-db", "2,64", *sharing)
    assert recipe.metadata.artifact_id == artifact.metadata.artifact_id == command.metadata.artifact_id
    params = SamplingParams(use_beam_search=True, n=2, max_tokens=8)
    [output] = LLM(tmp_path / "python").generate([1, 2, 3], params)
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 2


def test_layers_of_stages_can_be_given(user: UserDirectory, tmp_path: Path) -> None:
    artifact = built(user, tmp_path, pipeline_parallel_size=2, num_blocks_per_pp_stage=[1, 2])
    assert [spec.stage for spec in artifact.kv_cache] == [0, 1, 1]
    with pytest.raises(UserError, match=r"num_blocks_per_pp_stage=\[1, 1\]: 2 stages of 2 layers"):
        built(user, tmp_path, pipeline_parallel_size=2, num_blocks_per_pp_stage=[1, 1])


def test_truncated_and_random(user: UserDirectory, tmp_path: Path) -> None:
    artifact = built(user, tmp_path, num_hidden_layers=2, seed_for_random_weight=7)
    assert artifact.model_metadata.num_hidden_layers == 2
    assert artifact.model_metadata.seed_for_random_weight == 7


@pytest.mark.parametrize(
    ("given", "overrides"),
    [
        ({"num_blocks_per_supertask": 2}, ["rewriting.num_blocks_per_supertask=2"]),
        ({"use_blockwise_compile": False}, ["rewriting.use_blockwise_compile=false"]),
        ({"do_decompositions_for_model_rewrite": True}, ["rewriting.do_decompositions_for_model_rewrite=true"]),
        ({"embed_all_constants_into_graph": True}, ["rewriting.embed_all_constants_into_graph=true"]),
        (
            {"add_prefill_last_block_slice": True},
            ["rewriting.add_prefill_last_block_slice=true", "model.calculate_logit_only_for_last_token=true"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_how_the_model_is_rewritten_is_said_as_in_a_recipe(
    user: UserDirectory, given: dict[str, Any], overrides: list[str]
) -> None:
    """What that means for programs is shown by test_end_to_end/test_rewriting.py."""
    made = builder(user, name="tiny", decode_buckets=[(2, 64)], **given)
    recipe = user.open(*overrides).spec
    spec = validate("ArtifactBuilder", made._spec, {}, made._roots).spec
    assert spec.rewriting == recipe.rewriting != RewritingSpec()
    last_only = spec.model.calculate_logit_only_for_last_token
    assert last_only == recipe.model.calculate_logit_only_for_last_token


def test_parameters_from_a_file(user: UserDirectory, tmp_path: Path) -> None:
    """The same as a recipe with model.param_file_path: tests of fetch say what that is."""
    expected = built(user, tmp_path / "usual", name="one").metadata.artifact_id
    config_only, weights = tmp_path / "tiny", tmp_path / "weights.safetensors"
    shutil.copytree(user.root / "tiny", config_only)
    (config_only / "model.safetensors").rename(weights)
    arguments: dict[str, Any] = {"name": "one", "tensor_parallel_size": 1, "backend": "eager", **BUCKETS}
    apart = ArtifactBuilder(str(config_only), "cpu", **arguments)
    with pytest.raises(UserError, match="has no weights"):
        apart.build(tmp_path / "apart", cache_dir=user.store)
    apart.build(tmp_path / "apart", cache_dir=user.store, param_file_path=weights)
    assert open_artifact(tmp_path / "apart").artifact.metadata.artifact_id == expected


def test_the_cache_is_by_default_that_of_the_environment(
    user: UserDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FURIOSA_BUILD_CACHE", str(tmp_path / "store"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    builder(user, name="one").build(tmp_path / "out")
    assert (tmp_path / "store" / "blobs").is_dir()
    assert not (tmp_path / "home").exists()


@pytest.mark.grid
def test_without_a_cache_only_the_artifact_is_left(user: UserDirectory, tmp_path: Path) -> None:
    builder(user, name="one").build(tmp_path, cache_dir=None)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    open_artifact(tmp_path, verify="full")
    builder(user, name="one").build(tmp_path, cache_dir=None, _cleanup=False)
    assert len(list(tmp_path.glob(".store-*/blobs"))) == 1


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda user: builder(user, num_blocks_per_supertaks=2), "did you mean 'num_blocks_per_supertask'"),
        (lambda user: builder(user).build("x", num_compile_wrkers=2), "did you mean 'num_compile_workers'"),
        (lambda user: builder(user).build("x", param_saved_format="pt"), "valid: safetensors"),
        (lambda user: builder(user).build("x", param_file_path="y"), "parameter file 'y' does not exist"),
        (
            lambda user: builder(user, seed_for_random_weight=0).build("x", param_file_path="y"),
            "param_file_path='y' and seed_for_random_weight=0",
        ),
        (lambda user: builder(user, quantize_artifact_path="y").build("x"), "quantized checkpoint 'y' does not exist"),
        (lambda user: builder(user, quantize_artifact_path="y", quantization="fp8"), "scheme='fp8' has no effect"),
        (
            lambda user: builder(user, compiler_config_overrides={"max_autotune": True}).build("x"),
            "backend 'eager' has no option 'max_autotune'",
        ),
        (
            lambda user: builder(user, num_blocks_per_supertask=2, use_blockwise_compile=False),
            "num_blocks_per_supertask=2: a stage is one program",
        ),
        (
            lambda user: builder(user, add_prefill_last_block_slice=True, calculate_logit_only_for_last_token=False),
            "leaves the logits of the last token only",
        ),
        (
            lambda user: builder(user, kv_cache_sharing_across_beams_config=KvCacheSharingAcrossBeamsConfig(4, 128)),
            "max_new_tokens=128 is more than the longest decode bucket holds",
        ),
        (lambda user: builder(user, "npu:0:*", tensor_parallel_size=4, data_parallel_size=3), "12 elements"),
        (lambda user: builder(user, ["npu:0:0", "npu:0:0-1"]), "names npu:0:0 twice"),
        (lambda user: builder(user, "gpu:0"), "the device 'gpu:0' is not well formed"),
        (lambda user: builder(user, tensor_parallel_size="4"), "tensor_parallel_size"),
        (lambda user: builder(user, decode_buckets=[(1, 128)]), "longer than max_seq_len_to_capture=64"),
        (lambda user: builder(user, target="rngdd"), "did you mean 'rngd'"),
        (lambda user: builder(user, tensor_parallel_size=3).build("x"), "does not divide the 8 attention heads"),
        (lambda user: builder(user, backend="nothing").build("x"), "unknown backend 'nothing'"),
    ],
)
def test_a_mistake_is_one_error_and_nothing_is_written(
    user: UserDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[UserDirectory], Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UserError) as refused:
        make(user)
    assert message in str(refused.value)
    assert not (tmp_path / "x").exists()


def test_the_errors_of_a_build_are_raised(user: UserDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FURIOSA_BUILD_FAULT", "package@before-staging=errno:ENOSPC")
    with pytest.raises(BuildError, match="step package failed"):
        builder(user, name="never").build(tmp_path, cache_dir=user.store)
    monkeypatch.delenv("FURIOSA_BUILD_FAULT")
    with pytest.raises(PreflightError, match="needed"):
        builder(user, paged_attention_num_blocks=10**9, paged_attention_block_size=1024).build(tmp_path, cache_dir=None)


@pytest.mark.grid
def test_a_script_needs_no_guard(user: UserDirectory, tmp_path: Path) -> None:
    """The reference's example has no `if __name__ == "__main__"`: workers must not run it once more."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from furiosa_build.artifact.builder import ArtifactBuilder\n"
        "print('once')\n"
        f"builder = ArtifactBuilder({str(user.root / 'tiny')!r}, 'cpu', tensor_parallel_size=1, backend='eager',\n"
        "                          prefill_buckets=[(1, 8)], decode_buckets=[(1, 16)], max_seq_len_to_capture=16)\n"
        f"builder.build({str(tmp_path / 'out')!r}, cache_dir=None)\n"
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("once") == 1
    open_artifact(tmp_path / "out")
