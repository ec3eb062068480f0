"""Layers of one model with different schemes: built, divided, qualified, and read by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_models.tiny import GEMMA3, LLAMA, load, save_random_model

from furiosa_build.build.build import Build
from furiosa_build.core.errors import UserError
from furiosa_build.quant.scheme import scheme as find_scheme
from furiosa_build.runtime import LLMEngine, SamplingParams

from .test_against_transformers import logits_of

BuildArtifact = Callable[..., Path]
StartBuild = Callable[..., Build]
OutputsOf = Callable[[Build, str], Path]

MODEL = {**LLAMA, "num_hidden_layers": 2}
BUCKETS = {"prefill_buckets": [[1, 32]], "decode_buckets": [[2, 64]], "max_seq_len_to_capture": 64}
RULES = (
    {"match": "lm_head.weight", "scheme": "none"},
    {"match": "*.layers.1.*", "scheme": "int8"},
    {"match": "*.down_proj.weight", "scheme": "int8"},
)
"""Besides fp8: all of layer 1 is int8, and one projection of layer 0."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(MODEL, tmp_path_factory.mktemp("model") / "tiny")


def scheme_of(name: str) -> str:
    if not name.endswith("_proj.weight"):
        return "none"
    return "int8" if "layers.1" in name or "down_proj" in name else "fp8"


@pytest.mark.grid
def test_an_artifact_of_two_schemes_for_two_ranks_qualifies(model: Path, start_build: StartBuild) -> None:
    build = start_build(model, scheme="fp8", rules=RULES, parallel={"tensor_parallel_size": 2}, **BUCKETS)
    for step in build.plan.steps:
        build.run(step)
    artifact = json.loads((build.version_directory / "artifact.json").read_text())
    assert artifact["model_metadata"]["quantization"] == "fp8+int8"
    assert {program["kind"] for program in artifact["programs"].values()} == {"first", "block0", "block1", "last"}
    dtypes = {}
    for file in (build.version_directory / "params").glob("*rank-1*"):
        dtypes |= {name: tensor.dtype for name, tensor in load_file(file).items()}
    assert dtypes["model.layers.0.mlp.up_proj.weight"] == torch.float8_e4m3fn
    assert dtypes["model.layers.0.mlp.down_proj.weight_packed"] == torch.int32
    assert dtypes["model.layers.1.mlp.up_proj.weight_packed"] == torch.int32


@pytest.mark.grid
def test_transformers_loads_the_written_checkpoint_to_the_same_weights(
    model: Path, start_build: StartBuild, outputs_of: OutputsOf
) -> None:
    written = outputs_of(start_build(model, scheme="fp8", rules=RULES, **BUCKETS), "quantize")
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    groups = config["config_groups"]
    assert {name: (group["format"], len(group["targets"])) for name, group in groups.items()} == {
        "group_0": ("float-quantized", 6),
        "group_1": ("pack-quantized", 8),
    }
    assert config["ignore"] == ["lm_head"]
    reference = load(model)
    for name, parameter in reference.named_parameters():
        own = find_scheme(scheme_of(name))
        parameter.data = own.dequantize(own.quantize(parameter.data), parameter.dtype)
    tokens = torch.randint(0, 192, (30,), generator=torch.Generator().manual_seed(5)).tolist()
    expected = logits_of(reference, tokens)
    # The same float32 arithmetic on the same weights; transformers may unpack in another order of roundings.
    torch.testing.assert_close(logits_of(load(written), tokens), expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(expected, logits_of(load(model), tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.grid
def test_the_written_checkpoint_is_taken_and_gives_the_same_parameters_and_programs(
    model: Path, start_build: StartBuild, build_artifact: BuildArtifact, outputs_of: OutputsOf
) -> None:
    own = build_artifact(model, scheme="fp8", rules=RULES, **BUCKETS)
    written = outputs_of(start_build(model, scheme="fp8", rules=RULES, **BUCKETS), "quantize")
    taken = build_artifact(model, checkpoint=written, **BUCKETS)
    names = {path.relative_to(own) for path in own.rglob("*") if path.parent.name in ("params", "programs")}
    assert len(names) > 2
    for name in names:
        assert (own / name).read_bytes() == (taken / name).read_bytes(), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_quantized_head_serves_as_the_embedding_that_it_is_tied_to(
    tied: bool, build_artifact: BuildArtifact, tmp_path: Path
) -> None:
    model = save_random_model({**MODEL, "tie_word_embeddings": tied}, tmp_path / "model")
    artifact = build_artifact(model, scheme="fp8", lm_head="int8", **BUCKETS)
    stored = {}
    for file in (artifact / "params").glob("*.safetensors"):
        stored |= load_file(file)
    name = "model.embed_tokens" if tied else "lm_head"
    assert {each for each in stored if each.startswith(name)} == {
        f"{name}.weight_packed",
        f"{name}.weight_scale",
        f"{name}.weight_shape",
    }
    assert ("model.embed_tokens.weight" in stored) is not tied
    described = json.loads((artifact / "artifact.json").read_text())
    assert described["model_metadata"]["quantization"] == "fp8+int8"
    reference = load(model)
    for each, parameter in reference.named_parameters():
        text = "int8" if each == f"{name}.weight" else "fp8" if each.endswith("_proj.weight") else "none"
        own = find_scheme(text)
        parameter.data = own.dequantize(own.quantize(parameter.data), parameter.dtype)
    tokens = torch.randint(0, 192, (30,), generator=torch.Generator().manual_seed(5)).tolist()
    found: list[torch.Tensor] = []
    with closing(LLMEngine(artifact, on_logits=lambda _, row: found.append(torch.tensor(row)))) as engine:
        engine.add_request("a", {"prompt_token_ids": tokens}, SamplingParams(temperature=0, max_tokens=3))
        while engine.has_unfinished_requests():
            outputs = engine.step()
    [answer] = outputs
    expected = logits_of(reference, [*tokens, *answer.outputs[0].token_ids])[len(tokens) - 1 : -1]
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_cannot_be_quantized_is_refused(start_build: StartBuild, tmp_path: Path) -> None:
    model = save_random_model(GEMMA3, tmp_path / "model")
    with pytest.raises(UserError, match="the head of Gemma3ForCausalLM cannot be quantized") as refused:
        _ = start_build(model, lm_head="int8", **BUCKETS).plan
    assert refused.value.where == "quantization.lm_head"
