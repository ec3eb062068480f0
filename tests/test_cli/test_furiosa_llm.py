"""`furiosa-llm build`: the options of the reference, and how mistakes end. That it builds: tests of the builder.

`serve`: tests of the server.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from furiosa_build.cli import furiosa_llm

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


def test_the_options_are_those_of_the_reference() -> None:
    build = furiosa_llm.parser()._subparsers._group_actions[0].choices["build"]  # type: ignore[union-attr, index]
    assert [option for action in build._actions for option in action.option_strings] == OPTIONS
    assert [action.dest for action in build._actions if not action.option_strings] == ["output_path"]


def test_defaults() -> None:
    given = furiosa_llm.parser().parse_args(REQUIRED)
    assert (given.tensor_parallel_size, given.pipeline_parallel_size, given.data_parallel_size) == (4, 1, None)
    assert (given.prefill_buckets, given.decode_buckets, given.additional_model_config) == ([], [], [])
    assert (given.max_seq_len_to_capture, given.paged_attention_num_blocks) == (2048, None)
    assert (given.num_pipeline_builder_workers, given.num_compile_workers) == (1, 1)


def test_repeated_options() -> None:
    arguments = ["-pb", "1,512", "--prefill-buckets", "1,1024", "-db", "8,2048"]
    arguments += ["--additional-model-config", "calculate_logit_only_for_last_token=True"]
    arguments += ["--additional-model-config", "num_hidden_layers=2", "--additional-model-config", "backend=eager"]
    given = furiosa_llm.parser().parse_args([*REQUIRED, *arguments])
    assert given.prefill_buckets == [(1, 512), (1, 1024)]
    assert given.decode_buckets == [(8, 2048)]
    assert dict(given.additional_model_config) == {
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
    with pytest.raises(SystemExit) as ended:
        furiosa_llm.main(arguments)
    assert ended.value.code == 2
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
    assert "usage: furiosa-llm build" in ran.stdout
