from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import grid
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_models.tiny import GEMMA3, LLAMA, MISTRAL, MODELS, read_config, save_random_model
from user_directory import answer_in_this_process, judged_in_this_process

from furiosa_build.build.build import Build
from furiosa_build.core.errors import StepError
from furiosa_build.core.peak_memory import Watch
from furiosa_build.ir.qualification_limits import QualificationLimits
from furiosa_build.runtime.probe import Continuation, Questions, probe
from furiosa_build.steps import qualify
from furiosa_build.steps.qualification.asking import Asking

from .requests import Job, job

StartBuild = Callable[..., Build]


SOURCE, CONFIG = "source/model.safetensors", "source/config.json"

SMALL: dict[str, Any] = {
    "prefill_buckets": [[1, 32]],
    "append_buckets": [],
    "decode_buckets": [[4, 64]],
    "max_seq_len_to_capture": 64,
}
"""Two buckets: tracing is what takes time here."""


def judge(of: Job, output: Path) -> dict[str, Any]:
    """Runs the step, and returns its figures. The artifact answers in this process, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qualify, "judged", judged_in_this_process)
        of.run(output)
    assert [path.name for path in output.iterdir()] == [qualify.OUTPUT], "nothing else is kept"
    return dict(json.loads((output / qualify.OUTPUT).read_text()))


def qualify_of(build: Build) -> Job:
    """The step for a built artifact."""
    return job(build, "qualify")


def refusal(of: Job, output: Path) -> str:
    """Why the artifact does not qualify: words, and no Python."""
    with pytest.raises(StepError) as refused:
        judge(of, output)
    assert not set("{}") & set(refused.value.cause), refused.value.cause
    assert list(output.iterdir()) == []
    return refused.value.cause


@pytest.mark.parametrize(
    ("name", "scheme"),
    grid(
        [*((name, "none") for name in MODELS), ("llama", "fp8"), ("llama", "int8"), ("tied", "int8"), ("qwen2", "fp8")],
        [("llama", "none"), ("tied", "int8")],
    ),
)
def test_a_sound_artifact_qualifies(
    name: str, scheme: str, start_build: StartBuild, output: Path, tmp_path: Path
) -> None:
    model = save_random_model(MODELS[name], tmp_path / "model")
    found = judge(qualify_of(start_build(model, scheme=scheme, **SMALL)), output)
    assert found["tokens"] == 3 * 16 + 4
    assert found["buckets"] == ["decode-4x64", "prefill-1x32"]
    assert found["top1_agreement"] == 1.0
    assert found["largest_logit"] > 1
    # Well within: float32 on both sides, in another order.
    assert found["largest_logit_difference"] < 1e-5 * max(found["largest_logit"], 1)
    assert found["largest_logit_difference"] <= found["allowed_logit_difference"] / 5
    assert ("quantization_perplexity" in found) == (scheme != "none")


def test_a_bfloat16_artifact_qualifies(start_build: StartBuild, output: Path, tmp_path: Path) -> None:
    model = save_random_model({**LLAMA, "dtype": "bfloat16"}, tmp_path / "m", torch.bfloat16)
    found = judge(qualify_of(start_build(model, **SMALL)), output)
    assert found["top1_agreement"] > 0.8
    assert 0 < found["largest_logit_difference"] < found["allowed_logit_difference"]


def test_an_artifact_runs_in_a_fresh_process(start_build: StartBuild, output: Path) -> None:
    of = job(start_build(LLAMA, **SMALL), "qualify")
    of.run(output)
    assert [path.name for path in output.iterdir()] == [qualify.OUTPUT]
    assert json.loads((output / qualify.OUTPUT).read_text())["top1_agreement"] == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells private memory from mapped files")
def test_no_more_kv_cache_is_taken_than_the_prompts_need(start_build: StartBuild, tmp_path: Path) -> None:
    """An artifact may suggest KV blocks that fill a server. What is generated does not depend on how many there are."""
    questions, peaks = tmp_path / "questions.json", []
    asked = [Continuation(prompt=list(range(1, length)), max_tokens=16) for length in (8, 13, 18)]
    questions.write_text(Questions(rounds=[asked]).model_dump_json())
    for num_blocks in (12, 40_000):
        build = start_build(LLAMA, paged_attention_num_blocks=num_blocks, **SMALL)
        job(build, "qualify")
        with Watch() as watch:
            probe(build.version_directory, questions, tmp_path / f"{num_blocks}.safetensors")
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


@pytest.mark.parametrize("damage", grid([damaged_program, missing_parameters], [damaged_program]))
def test_an_artifact_that_does_not_run_fails_with_the_reason(
    damage: Callable[[Path], None], start_build: StartBuild, tmp_path: Path
) -> None:
    build = start_build(LLAMA, **SMALL)
    job(build, "qualify")
    copy = tmp_path / "copy"
    shutil.copytree(build.version_directory, copy)
    damage(copy)
    with (
        pytest.raises(StepError, match="the artifact does not run: damaged artifact"),
        Asking(copy, tmp_path) as asking,
    ):
        asking.ask(Questions())


@pytest.mark.parametrize(
    ("hf_config", "changes"),
    [
        (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        pytest.param(LLAMA, {"rms_norm_eps": 1e-2}, marks=pytest.mark.grid),
        pytest.param(LLAMA, {"hidden_act": "gelu"}, marks=pytest.mark.grid),
        pytest.param(MISTRAL, {"sliding_window": None}, marks=pytest.mark.grid),
        pytest.param(MISTRAL, {"sliding_window": 11}, marks=pytest.mark.grid),
        pytest.param(GEMMA3, {"query_pre_attn_scalar": 32}, marks=pytest.mark.grid),
    ],
    ids=["rope", "norm", "activation", "no-window", "window", "scaling"],
)
def test_programs_of_another_model_fail(
    hf_config: dict[str, Any], changes: dict[str, Any], start_build: StartBuild, output: Path, tmp_path: Path
) -> None:
    """As if tracing had got one thing wrong: the artifact runs, and says what a slightly different model would."""
    model = save_random_model({**hf_config, **changes}, tmp_path / "model")
    right = {key: value for key, value in read_config(model).items() if key not in changes}
    right |= {key: hf_config[key] for key in changes if key in hf_config}
    (tmp_path / "config.json").write_text(json.dumps(right))
    of = qualify_of(start_build(model, **SMALL)).with_files({CONFIG: tmp_path / "config.json"})
    why = refusal(of, output)
    assert "the artifact's logits are not the model's" in why
    assert "after token " in why
    assert "in bucket " in why


@pytest.mark.grid
def test_programs_of_another_model_fail_where_weights_are_drawn(start_build: StartBuild, output: Path) -> None:
    of = qualify_of(start_build({**LLAMA, "rms_norm_eps": 1e-2}, **SMALL)).changed(hf_config=LLAMA)
    assert "the artifact's logits are not the model's" in refusal(of, output)


@pytest.mark.parametrize("parameter", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_one_wrong_parameter_fails(parameter: str, start_build: StartBuild, output: Path, tmp_path: Path) -> None:
    """The artifact has the weights of a directory; transformers gets one with one row of one matrix changed."""
    model = save_random_model(LLAMA, tmp_path / "model")
    of = qualify_of(start_build(model, **SMALL))
    weights = load_file(model / "model.safetensors")
    weights[parameter][17:18] *= -1
    save_file(weights, tmp_path / "other.safetensors", {"format": "pt"})
    why = refusal(of.with_files({SOURCE: tmp_path / "other.safetensors"}), output)
    assert f"look at the weights: {parameter} is another tensor by transformers" in why


def test_a_head_that_is_not_the_embedding_fails(start_build: StartBuild, output: Path, tmp_path: Path) -> None:
    """As if the build had tied a head that the source has apart: config.json says tied, the file has another one."""
    model = save_random_model(MODELS["tied"], tmp_path / "model")
    of = qualify_of(start_build(model, **SMALL))
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, tmp_path / "other.safetensors", {"format": "pt"})
    why = refusal(of.with_files({SOURCE: tmp_path / "other.safetensors"}), output)
    assert "lm_head.weight is a parameter of its own by transformers, and tied to another one here" in why


def test_weights_that_transformers_does_not_read_fail(start_build: StartBuild, output: Path, tmp_path: Path) -> None:
    """As if the build had taken shards that an index names, beside a single file that transformers prefers."""
    model = save_random_model(LLAMA, tmp_path / "model")
    of = qualify_of(start_build(model, **SMALL))
    weights = load_file(model / "model.safetensors")
    shard, index = "model-00001-of-00001.safetensors", tmp_path / "index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}))
    save_file({name: -tensor for name, tensor in weights.items()}, tmp_path / "single", {"format": "pt"})
    files = {SOURCE: tmp_path / "single", f"source/{shard}": model / "model.safetensors"}
    why = refusal(of.with_files({**files, "source/model.safetensors.index.json": index}), output)
    assert "is another tensor by transformers (which file, and which name in it, was read?)" in why


def test_weights_that_the_source_lacks_fail(start_build: StartBuild, output: Path, tmp_path: Path) -> None:
    model = save_random_model(LLAMA, tmp_path / "model")
    of = qualify_of(start_build(model, **SMALL))
    weights = load_file(model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "other.safetensors", {"format": "pt"})
    why = refusal(of.with_files({SOURCE: tmp_path / "other.safetensors"}), output)
    assert why == "the source has no weights for lm_head.weight: transformers would draw 1 parameters at random"


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_wrong_scale_of_a_quantized_checkpoint_fails(
    scheme: str, start_build: StartBuild, output: Path, tmp_path: Path
) -> None:
    model = save_random_model(LLAMA, tmp_path / "model")
    of = qualify_of(start_build(model, scheme=scheme, **SMALL))
    weights = load_file(of.inputs.files["weights/model.safetensors"])
    weights["model.layers.2.mlp.up_proj.weight_scale"] *= 1.1
    save_file(weights, tmp_path / "wrong.safetensors")
    why = refusal(of.with_files({"weights/model.safetensors": tmp_path / "wrong.safetensors"}), output)
    assert "the artifact's logits are not the model's" in why


def test_quantized_tensors_that_are_swapped_fail(start_build: StartBuild, output: Path, tmp_path: Path) -> None:
    """The artifact agrees with its checkpoint, and the checkpoint is wrong."""
    model = save_random_model(LLAMA, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]
    save_file(weights, tmp_path / "swapped.safetensors", {"format": "pt"})
    of = qualify_of(start_build(model, scheme="int8", **SMALL))
    why = refusal(of.with_files({SOURCE: tmp_path / "swapped.safetensors"}), output)
    assert f"the quantized {gate} is not that of the source: it differs by 14" in why


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_kl_divergence": 1e-9}, r"diverge by \S+ nats .*\(qualify.max_kl_divergence=1e-09\)"),
        pytest.param(
            {"max_perplexity_ratio": 0.5},
            r"its perplexity is .*\(qualify.max_perplexity_ratio=0.5\)",
            marks=pytest.mark.grid,
        ),
        pytest.param(
            {"min_top1_agreement": 1.0},
            r"first for \d\d.\d% of .*\(qualify.min_top1_agreement=1\)",
            marks=pytest.mark.grid,
        ),
        pytest.param({"logit_tolerance": 1e-9}, "the artifact's logits are not the model's", marks=pytest.mark.grid),
    ],
    ids=["kl", "perplexity", "top-1", "tolerance"],
)
def test_limits(limits: dict[str, float], expected: str, start_build: StartBuild, output: Path, tmp_path: Path) -> None:
    model = save_random_model(LLAMA, tmp_path / "model")
    of = qualify_of(start_build(model, scheme="fp8", **SMALL))
    judge(of, output)  # it qualifies with the usual limits
    (output / qualify.OUTPUT).unlink()
    assert re.search(expected, refusal(of.changed(limits=QualificationLimits(**limits)), output))


@pytest.mark.parametrize("where", ["one logit", "every logit", "source"])
def test_what_is_not_a_number_fails(
    where: str, start_build: StartBuild, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison with NaN is false whichever way it is put."""
    model = save_random_model(LLAMA, tmp_path / "model")
    of = qualify_of(start_build(model, **SMALL))

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if where == "every logit" and name.startswith("logits"):
                tensor *= float("nan")
            elif name == "logits.0":
                tensor[5, 100] = float("nan")

    if where == "source":
        weights = load_file(model / "model.safetensors")
        weights["model.norm.weight"][3] = float("nan")
        save_file(weights, tmp_path / "other.safetensors", {"format": "pt"})
        of = of.with_files({SOURCE: tmp_path / "other.safetensors"})
    else:
        answering(monkeypatch, lambda _, tensors: spoil(tensors))
    assert re.match(r"the (artifact|reference)'s logits are not finite after token \d+", refusal(of, output))


def test_a_sequence_that_depends_on_its_neighbours_fails(
    start_build: StartBuild, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a mask or a table were shared by a batch."""

    def spoil(questions: Questions, logits: dict[str, torch.Tensor]) -> None:
        if len(questions.rounds[0]) > 1:
            logits["logits.1"][3] += torch.arange(192)

    answering(monkeypatch, spoil)
    why = refusal(qualify_of(start_build(LLAMA, **SMALL)), output)
    assert "after token 15 of sequence 1, in bucket decode-4x64" in why
    assert "look at what depends on its neighbours in a batch" in why


BEAMS = {**SMALL, "kv_cache_sharing_across_beams_config": {"beam_width": 2, "max_new_tokens": 8}}


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda _: None, ""),
        (lambda t: t["scores.6"].sub_(1), "beam 0 of sequence 6: its log probability is "),
        (lambda t: [t[name].copy_(t[name].flip(0)) for name in ("beams.6", "scores.6")], "finds one of "),
    ],
    ids=["sound", "score", "order"],
)
def test_beams(
    spoil: Callable[[dict[str, torch.Tensor]], object],
    expected: str,
    start_build: StartBuild,
    output: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of = qualify_of(start_build(save_random_model(LLAMA, tmp_path / "model"), **BEAMS))
    answering(monkeypatch, lambda _, tensors: spoil(tensors))
    if expected:
        why = refusal(of, output)
        assert why.startswith("the artifact's beams are not the model's: ")
        assert expected in why
    else:
        judge(of, output)


def answering(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Questions, dict[str, torch.Tensor]], None]) -> None:
    """The artifact answers what it does answer, after `spoil` has changed it."""
    usual = answer_in_this_process

    def answer(artifact: Path, questions: Questions, work: Path) -> Path:
        file = usual(artifact, questions, work)
        with safe_open(file, "pt") as opened:
            told = opened.metadata()
        tensors = load_file(file)
        spoil(questions, tensors)
        save_file(tensors, file, told)
        return file

    monkeypatch.setattr("user_directory.answer_in_this_process", answer)


@pytest.mark.grid
def test_an_artifact_with_a_quantized_head_is_compared_with_a_model_that_has_it_too(
    start_build: StartBuild, output: Path, tmp_path: Path
) -> None:
    """Without the embedding, or without the head, that is rounded as the artifact's the logits differ by far more."""
    model = save_random_model(MODELS["tied"], tmp_path / "model")
    found = judge(qualify_of(start_build(model, scheme="int8", lm_head="int8", **SMALL)), output)
    assert found["largest_logit_difference"] <= 1e-4
    assert found["top1_agreement"] == 1.0
