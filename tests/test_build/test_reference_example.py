"""The examples of furiosa-build-model-artifact.rst, word for word, with a small model in place of the 8B."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_end_to_end.test_parallel import MODELS
from test_models.tiny import save_random_model
from user_directory import steps_in_this_process

from furiosa_build.artifact.reader import open_artifact
from furiosa_build.artifact.schema import Artifact
from furiosa_build.build import artifact_builder
from furiosa_build.cli import furiosa_llm
from furiosa_build.runtime import LLM, SamplingParams

PYTHON = """\
from furiosa_llm.artifact.builder import ArtifactBuilder
from furiosa_llm.models.config_types import SchedulerConfig


builder = ArtifactBuilder(
    "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "npu:0:*",
    "mlperf-llama3-1-8b-fp8",
    tensor_parallel_size=4,
    pipeline_parallel_size=1,
    prefill_buckets=[
        (1, 512),
        (1, 1024),
    ],
    decode_buckets=[
        (1, 2048),
        (8, 2048),
        (16, 2048),
        (64, 2048),
        (128, 2048),
    ],
    quantize_artifact_path="/path_to/quantized_artifacts",
    calculate_logit_only_for_last_token=True,
    paged_attention_num_blocks=512_000,
    default_scheduler_config=SchedulerConfig(
        max_processing_samples=24576,
        spare_blocks_ratio=0.6,
        npu_queue_limit=2,
    ),
)

builder.build(
    "/path_to/artifact",
    num_pipeline_builder_workers=4,
    num_compile_workers=4,
)
"""

SHELL = """\
furiosa-llm build /path/to/artifacts \\
    --model-id meta-llama/Meta-Llama-3.1-8B-Instruct \\
    --devices "npu:0:*" \\
    --name mlperf-llama3-1-8b-fp8 \\
    -tp 4 -pp 1 \\
    -pb 1,512 -pb 1,1024 \\
    -db 1,2048 -db 8,2048 -db 16,2048 -db 64,2048 -db 128,2048 \\
    --quantization-artifact-path /path/to/quantized_artifacts \\
    --paged-attention-num-blocks 512000 \\
    --additional-model-config calculate_logit_only_for_last_token=True \\
    --num-pipeline-builder-workers 4 \\
    --num-compile-workers 4
"""


class EagerBuilder(artifact_builder.ArtifactBuilder):
    """The one thing that the texts leave open. Eighty plans would take a minute."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, backend="eager")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 8 heads and 2 layers, for 2048 tokens."""
    config = {**MODELS["llama"], "num_hidden_layers": 2, "max_position_embeddings": 2048}
    return save_random_model(config, tmp_path_factory.mktemp("example") / "tiny")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both keep finished steps in the default store; the second finds what the first has compiled."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _small_and_here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("FURIOSA_BUILD_CACHE", raising=False)
    monkeypatch.setattr(artifact_builder, "ArtifactBuilder", EagerBuilder)
    with steps_in_this_process():
        yield


def with_local_paths(text: str, model: Path, output: Path) -> str:
    """What a reader replaces. The line of the quantized checkpoint is left out: the model is in float32."""
    text = "".join(line for line in text.splitlines(keepends=True) if "quantized_artifacts" not in line)
    for old, new in (
        ("furiosa_llm.", "furiosa_build."),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", str(model)),
        ("/path_to/artifact", str(output)),
        ("/path/to/artifacts", str(output)),
    ):
        text = text.replace(old, new)
    return text


def check(directory: Path) -> Artifact:
    artifact = open_artifact(directory, verify="full").artifact
    assert artifact.metadata.name == "mlperf-llama3-1-8b-fp8"
    assert artifact.devices == "npu:0:*"
    assert artifact.parallel_config.model_dump() == {
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 2,  # 8 elements, 4 for each replica
    }
    config = artifact.generator_config
    assert config.prefill_buckets == [(1, 512), (1, 1024)]
    assert config.decode_buckets == [(batch, 2048) for batch in (1, 8, 16, 64, 128)]
    assert config.paged_attention_num_blocks == 512_000
    assert config.calculate_logit_only_for_last_token
    [output] = LLM(directory).generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 4
    return artifact


@pytest.mark.grid
def test_python(model: Path, tmp_path: Path) -> None:
    exec(with_local_paths(PYTHON, model, tmp_path / "out"), {})
    scheduler = check(tmp_path / "out").generator_config.default_scheduler_config
    assert (scheduler.max_processing_samples, scheduler.spare_blocks_ratio, scheduler.npu_queue_limit) == (
        24576,
        0.6,
        2,
    )


@pytest.mark.grid
def test_shell(model: Path, tmp_path: Path) -> None:
    command = with_local_paths(SHELL, model, tmp_path / "out").replace("\\\n", "")  # a shell joins the lines
    program, *arguments = shlex.split(command)
    assert program == "furiosa-llm"
    with pytest.raises(SystemExit) as ended:
        furiosa_llm.main(arguments)
    assert ended.value.code == 0
    check(tmp_path / "out")
