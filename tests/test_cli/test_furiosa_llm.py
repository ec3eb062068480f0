"""`furiosa-llm build`: the options of the reference, and how mistakes end. That it builds: tests of the builder.

`serve`: tests of the server.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from furiosa_build.cli import furiosa_llm
from furiosa_build.core.errors import UserError

OPTIONS = [
    "-h",
    "--help",
    "--model-id",
    "--name",
    "--devices",
    "-tp",
    "--tensor-parallel-size",
    "-pp",
    "--pipeline-parallel-size",
    "-dp",
    "--data-parallel-size",
    "-pb",
    "--prefill-buckets",
    "-db",
    "--decode-buckets",
    "--max-seq-len-to-capture",
    "--additional-model-config",
    "--quantization-artifact-path",
    "--kv-cache-sharing-across-beams-config",
    "--paged-attention-num-blocks",
    "--num-pipeline-builder-workers",
    "--num-compile-workers",
]
"""Of furiosa-build-model-artifact.rst, in its order."""

REQUIRED = ["build", "out", "--model-id", "m"]


def run(*arguments: str) -> int:
    """`furiosa-llm`; returns the exit status."""
    with pytest.raises(SystemExit) as ended:
        furiosa_llm.main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_options_are_those_of_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", "--help") == 0
    help_text = capsys.readouterr().out
    usage, options = help_text.split("Options:")
    assert usage.startswith("Usage: furiosa-llm build [OPTIONS] {output_path}\n\n  Build an artifact.\n")
    found = re.findall(r"(?m)^  (-[a-z-]+)(?:, (-[a-z-]+))?", options)
    assert [name for names in found for name in names if name] == [*OPTIONS[2:], *OPTIONS[:2]]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reaches ArtifactBuilder, in place of a build."""
    found: dict[str, Any] = {}

    class Builder:
        def __init__(self, model_id: str, devices: str, name: str, **arguments: Any) -> None:
            found.update(model_id=model_id, devices=devices, name=name, **arguments)

        def recipe(self, output_path: str, **options: Any) -> Any:
            found.update(output_path=output_path, **options)
            raise UserError("enough")

    monkeypatch.setattr("furiosa_build.build.artifact_builder.ArtifactBuilder", Builder)
    monkeypatch.setenv("FURIOSA_BUILD_CACHE", "/store")
    return found


def test_defaults(given: dict[str, Any]) -> None:
    assert run(*REQUIRED) == 2
    assert given == {
        "model_id": "m",
        "output_path": "out",
        "name": "",
        "devices": "npu:0",
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 1,
        "data_parallel_size": None,
        "prefill_buckets": [],
        "decode_buckets": [],
        "max_seq_len_to_capture": None,
        "quantize_artifact_path": None,
        "kv_cache_sharing_across_beams_config": None,
        "paged_attention_num_blocks": None,
        "cache_dir": Path("/store"),
        "num_pipeline_builder_workers": 1,
        "num_compile_workers": 1,
    }


def test_every_option(given: dict[str, Any]) -> None:
    arguments = ["--name", "n", "--devices", "npu:0:*", "-tp", "8", "-pp=2", "--data-parallel-size", "1"]
    arguments += ["-pb", "1,512", "--prefill-buckets", "1,1024", "-db", "8,2048", "--max-seq-len-to-capture", "4096"]
    arguments += ["--additional-model-config", "calculate_logit_only_for_last_token=True"]
    arguments += ["--additional-model-config", "num_hidden_layers=2", "--additional-model-config", "backend=eager"]
    arguments += ["--quantization-artifact-path", "q", "--kv-cache-sharing-across-beams-config", "4,128"]
    arguments += ["--paged-attention-num-blocks", "9"]
    arguments += ["--num-pipeline-builder-workers", "2", "--num-compile-workers", "3"]
    assert run(*REQUIRED, *arguments) == 2
    assert given == {
        "model_id": "m",
        "output_path": "out",
        "name": "n",
        "devices": "npu:0:*",
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 2,
        "data_parallel_size": 1,
        "prefill_buckets": [(1, 512), (1, 1024)],
        "decode_buckets": [(8, 2048)],
        "max_seq_len_to_capture": 4096,
        "quantize_artifact_path": "q",
        "kv_cache_sharing_across_beams_config": (4, 128),
        "paged_attention_num_blocks": 9,
        "cache_dir": Path("/store"),
        "num_pipeline_builder_workers": 2,
        "num_compile_workers": 3,
        "calculate_logit_only_for_last_token": True,
        "num_hidden_layers": 2,
        "backend": "eager",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "out"], "--model-id"),
        ([*REQUIRED, "-pb", "512"], "'512' is not of the form 1,512"),
        ([*REQUIRED, "--additional-model-config", "x"], "'x' is not of the form key=value"),
        ([*REQUIRED, "--additional-model-config", "num_hiden_layers=2"], "did you mean 'num_hidden_layers'"),
        ([*REQUIRED, "--additional-model-config", "tensor_parallel_size=2"], "has an option of its own"),
        ([*REQUIRED, "--devices", "npu:0:9"], "'npu:0:9' is not there"),
        ([*REQUIRED, "--nonsense"], "--nonsense"),
        ([*REQUIRED, "--kv-cache-sharing-across-beams-config", "4"], "'4' is not of the form 1,512"),
        (["build", "out", "--model-id", "./nowhere"], "does not exist"),
    ],
)
def test_a_mistake_ends_with_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FURIOSA_BUILD_CACHE", str(tmp_path / "store"))
    assert run(*arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from furiosa_build.cli.furiosa_llm import main\n"
        "try: main(['build', '--help'])\n"
        "finally: print({'torch', 'transformers'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.endswith("set()\n")
    assert "Usage: furiosa-llm build" in ran.stdout
