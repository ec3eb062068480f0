from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models.tiny import GEMMA3, LLAMA, MISTRAL, MODELS, save_random_model

from furiosa_build.build.build import Build
from furiosa_build.core.errors import StepError
from furiosa_build.core.peak_memory import Watch
from furiosa_build.runtime.probe import probe
from furiosa_build.steps import qualify

from .requests import Job, job

StartBuild = Callable[..., Build]


WEIGHTS = "weights/model.safetensors"

SMALL: dict[str, Any] = {
    "prefill_buckets": [[1, 32]],
    "append_buckets": [],
    "decode_buckets": [[4, 64]],
    "max_seq_len_to_capture": 64,
}
"""Two buckets: tracing is what takes time here."""


@pytest.fixture
def output(tmp_path: Path) -> Path:
    directory = tmp_path / "output"
    directory.mkdir()
    return directory


@pytest.fixture
def qualify_of(output: Path) -> Callable[[Build], Job]:
    """The step for a built artifact, and what the artifact generates (in this process, to save time)."""

    def make(build: Build) -> Job:
        found = job(build, "qualify")
        probe(build.version_directory, output / qualify.PROBED)
        return found

    return make


def compare(of: Job, output: Path) -> None:
    """Runs the step on what has been generated already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qualify, "generate", lambda *_: output / qualify.PROBED)
        of.run(output)


def figures(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / qualify.OUTPUT).read_text()))


@pytest.mark.parametrize(
    ("name", "scheme"),
    [*((name, "none") for name in MODELS), ("llama", "fp8"), ("llama", "int8"), ("tied", "int8"), ("qwen2", "fp8")],
)
def test_a_sound_artifact_qualifies(
    name: str,
    scheme: str,
    start_build: StartBuild,
    qualify_of: Callable[[Build], Job],
    output: Path,
    tmp_path: Path,
) -> None:
    model = save_random_model(MODELS[name], tmp_path / "model")
    compare(qualify_of(start_build(model, scheme=scheme, **SMALL)), output)
    found = figures(output)
    assert [path.name for path in output.iterdir()] == [qualify.OUTPUT], "what was generated is not kept"
    assert found["tokens"] == 3 * 16
    assert found["top1_agreement"] == 1.0
    assert found["largest_logit"] > 1
    # Well within: float32 on both sides, in another order.
    assert found["largest_logit_difference"] < 1e-5 * max(found["largest_logit"], 1)
    assert found["largest_logit_difference"] <= found["allowed_logit_difference"] / 5


def test_a_bfloat16_artifact_qualifies(
    start_build: StartBuild, qualify_of: Callable[[Build], Job], output: Path, tmp_path: Path
) -> None:
    model = save_random_model({**LLAMA, "dtype": "bfloat16"}, tmp_path / "m", torch.bfloat16)
    compare(qualify_of(start_build(model, **SMALL)), output)
    found = figures(output)
    assert found["top1_agreement"] > 0.8
    assert 0 < found["largest_logit_difference"] < found["allowed_logit_difference"]


def test_an_artifact_runs_in_a_fresh_process(start_build: StartBuild, output: Path) -> None:
    build = start_build(LLAMA, **SMALL)
    of = job(build, "qualify")
    probed = qualify.generate(build.version_directory, output)
    assert set(load_file(probed)) == {f"{kind}.{i}" for kind in ("tokens", "logits") for i in range(3)}
    probed.unlink()
    of.run(output)
    assert [path.name for path in output.iterdir()] == [qualify.OUTPUT]
    assert figures(output)["top1_agreement"] == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells private memory from mapped files")
def test_no_more_kv_cache_is_taken_than_the_prompts_need(start_build: StartBuild, tmp_path: Path) -> None:
    """An artifact may suggest KV blocks that fill a server. What is generated does not depend on how many there are."""
    peaks = []
    for num_blocks in (12, 40_000):
        build = start_build(LLAMA, paged_attention_num_blocks=num_blocks, **SMALL)
        job(build, "qualify")
        with Watch() as watch:
            probe(build.version_directory, tmp_path / f"{num_blocks}.safetensors")
        assert watch.peak is not None
        peaks.append(watch.peak.private)
    few, many = (load_file(path) for path in sorted(tmp_path.glob("*.safetensors")))
    assert few.keys() == many.keys()
    assert all(tensor.equal(many[name]) for name, tensor in few.items())
    assert peaks[1] - peaks[0] < 50e6, "40,000 blocks of 16 tokens take 491 MB"


# What must not qualify.


def damaged_program(artifact: Path) -> None:
    program = next((artifact / "programs").iterdir())
    content = program.read_bytes()
    program.unlink()  # it is a link into the store
    program.write_bytes(content[:-40])


def missing_parameters(artifact: Path) -> None:
    next((artifact / "params").iterdir()).unlink()


@pytest.mark.parametrize("damage", [damaged_program, missing_parameters])
def test_an_artifact_that_does_not_run_fails_with_its_log(
    damage: Callable[[Path], None],
    start_build: StartBuild,
    output: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    build = start_build(LLAMA, **SMALL)
    job(build, "qualify")
    copy = tmp_path / "copy"
    shutil.copytree(build.version_directory, copy)
    damage(copy)
    with pytest.raises(StepError, match="does not run"):
        qualify.generate(copy, output)
    assert "damaged artifact" in capfd.readouterr().err
    assert list(output.iterdir()) == []


def refused(of: Job, output: Path) -> None:
    with pytest.raises(RuntimeError, match=r"logits are not"):
        compare(of, output)


@pytest.mark.parametrize(
    ("hf_config", "changes"),
    [
        (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        (LLAMA, {"rms_norm_eps": 1e-2}),
        (LLAMA, {"hidden_act": "gelu"}),
        (MISTRAL, {"sliding_window": None}),
        (MISTRAL, {"sliding_window": 11}),
        (GEMMA3, {"query_pre_attn_scalar": 32}),
    ],
    ids=["rope", "norm", "activation", "no-window", "window", "scaling"],
)
def test_programs_of_another_model_fail(
    hf_config: dict[str, Any],
    changes: dict[str, Any],
    start_build: StartBuild,
    qualify_of: Callable[[Build], Job],
    output: Path,
) -> None:
    """As if tracing had got one thing wrong: the artifact runs, and says what a slightly different model would."""
    of = qualify_of(start_build({**hf_config, **changes}, **SMALL))
    refused(of.changed(hf_config=hf_config), output)


@pytest.mark.parametrize("parameter", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_one_wrong_parameter_fails(
    parameter: str,
    start_build: StartBuild,
    qualify_of: Callable[[Build], Job],
    output: Path,
    tmp_path: Path,
) -> None:
    """The artifact has the weights of a directory; the reference is given one with one row of one matrix changed."""
    model = save_random_model(LLAMA, tmp_path / "model")
    of = qualify_of(start_build(model, **SMALL))
    weights = load_file(model / "model.safetensors")
    weights[parameter][17:18] *= -1
    save_file(weights, tmp_path / "other.safetensors")
    refused(of.with_files({WEIGHTS: tmp_path / "other.safetensors"}), output)


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_one_wrong_byte_pattern_of_a_quantized_checkpoint_fails(
    scheme: str, start_build: StartBuild, qualify_of: Callable[[Build], Job], output: Path, tmp_path: Path
) -> None:
    of = qualify_of(start_build(LLAMA, scheme=scheme, **SMALL))
    weights = load_file(of.inputs.files[WEIGHTS])
    weights["model.layers.2.mlp.up_proj.weight_scale"] *= 1.1
    save_file(weights, tmp_path / "wrong.safetensors")
    refused(of.with_files({WEIGHTS: tmp_path / "wrong.safetensors"}), output)


@pytest.mark.parametrize("where", ["one logit", "every logit", "reference"])
def test_what_is_not_a_number_fails(
    where: str,
    start_build: StartBuild,
    qualify_of: Callable[[Build], Job],
    output: Path,
    tmp_path: Path,
) -> None:
    """A comparison with NaN is false whichever way it is put."""
    model = save_random_model(LLAMA, tmp_path / "model")
    of, file = qualify_of(start_build(model, **SMALL)), output / qualify.PROBED
    probed, weights = load_file(file), load_file(model / "model.safetensors")
    if where == "reference":
        weights["model.norm.weight"][3] = float("nan")
    elif where == "one logit":
        probed["logits.0"][5, 100] = float("nan")
    else:
        probed = {name: t * float("nan") if name.startswith("logits") else t for name, t in probed.items()}
    save_file(probed, file)
    save_file(weights, model / "model.safetensors")
    refused(of, output)
