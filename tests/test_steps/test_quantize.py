from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from grid import grid
from safetensors.torch import load_file, save_file
from test_models.tiny import MODELS, load, read_config, save_random_model
from torch import Tensor
from transformers import PreTrainedModel

from furiosa_build.build.build import Build
from furiosa_build.core.errors import UserError
from furiosa_build.quant.scheme import scheme as find_scheme
from furiosa_build.steps import quantize as step

from .requests import job

StartBuild = Callable[..., Build]
OutputsOf = Callable[[Build, str], Path]

KEEP_HEAD = ({"match": "lm_head.weight", "scheme": "none"},)
"""As the shipped schemes have it."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: save_random_model(MODELS[name], root / name))


def dequantized(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that a checkpoint stands for, by compressed-tensors' unpacking and torch's own float8."""
    weights = {}
    for name, tensor in checkpoint.items():
        module, _, kind = name.rpartition(".")
        scale = checkpoint.get(f"{module}.weight_scale")
        if kind == "weight_packed":
            assert scale is not None
            shape = torch.Size(checkpoint[f"{module}.weight_shape"].tolist())
            weights[f"{module}.weight"] = unpack_from_int32(tensor, 8, shape).float() * scale
        elif kind == "weight":
            weights[name] = tensor.float() if scale is None else tensor.float() * scale
        elif kind == "bias":
            weights[name] = tensor
    return weights


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    tokens = torch.randint(0, 192, (2, 20), generator=torch.Generator().manual_seed(5))
    return model(tokens, use_cache=False).logits  # type: ignore[no-any-return]


def test_transformers_loads_groups_of_four_bits_as_the_same_weights(
    saved: Callable[[str], Path], start_build: StartBuild, outputs_of: OutputsOf
) -> None:
    build = start_build(saved("qwen2"), scheme="int4", group_size=32, rules=KEEP_HEAD)
    checkpoint = outputs_of(build, "quantize")
    stored, model = load_file(checkpoint / "model.safetensors"), load(checkpoint)
    logits_of(model)  # it unpacks when it runs
    loaded, own = dict(model.named_parameters()), find_scheme("int4-32")
    assert build.plan.models[""].schemes
    for parameter in build.plan.models[""].schemes:
        layout = build.plan.models[""].outline.parameters[parameter].layout
        parts = {part: stored[own.stored_name(parameter, part)] for part in own.parts(layout)}
        assert own.dequantize(parts, torch.float32).equal(loaded[parameter]), parameter


@pytest.mark.parametrize("rules", [(), KEEP_HEAD], ids=["all", "but-head"])
@pytest.mark.parametrize("scheme", ["fp8", "int8"])
@pytest.mark.parametrize("name", ["llama", "tied", "qwen2"])
def test_transformers_loads_the_checkpoint_and_computes_with_the_dequantized_weights(
    name: str, scheme: str, rules: Any, saved: Callable[[str], Path], start_build: StartBuild, outputs_of: OutputsOf
) -> None:
    checkpoint = outputs_of(start_build(saved(name), scheme=scheme, rules=rules), "quantize")
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "model.safetensors"]
    stored = load_file(checkpoint / "model.safetensors")
    head_is_quantized = name != "tied" and not rules
    assert ("lm_head.weight_scale" in stored) == head_is_quantized

    reference = load(saved(name))
    unquantized = logits_of(reference)
    missing, unexpected = reference.load_state_dict(dequantized(stored), strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if name == "tied" else [])
    expected = logits_of(reference)
    assert not torch.allclose(expected, unquantized, rtol=1e-3, atol=1e-3), "nothing has been quantized"

    # The same float32 arithmetic on the same weights; transformers may unpack in another order of roundings.
    torch.testing.assert_close(logits_of(load(checkpoint)), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_checkpoint_of_several_files_is_the_same_checkpoint(
    name: str,
    saved: Callable[[str], Path],
    start_build: StartBuild,
    outputs_of: OutputsOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = start_build(saved(name), scheme="int8", rules=KEEP_HEAD)
    one = outputs_of(build, "quantize")
    whole = load_file(one / "model.safetensors")
    monkeypatch.setattr(step, "LARGEST_FILE", 50_000)
    several = tmp_path / "several"
    several.mkdir()
    digests = job(build, "quantize").run(several)

    files = sorted(several.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert digests == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    index = json.loads((several / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    for file in files:
        for tensor_name, tensor in load_file(file).items():
            assert index["weight_map"][tensor_name] == file.name
            assert tensor.equal(whole[tensor_name])
    assert logits_of(load(several)).equal(logits_of(load(one))), "transformers reads both alike"


def test_the_first_rule_that_matches_decides(
    saved: Callable[[str], Path], start_build: StartBuild, outputs_of: OutputsOf
) -> None:
    rules = (
        {"match": "*.layers.1.mlp.down_proj.weight", "scheme": "fp8"},
        {"match": "*.down_proj.weight", "scheme": "none"},
        *KEEP_HEAD,
    )
    checkpoint = outputs_of(start_build(saved("llama"), scheme="fp8", rules=rules), "quantize")
    stored = load_file(checkpoint / "model.safetensors")
    original = load_file(saved("llama") / "model.safetensors")
    for layer, is_quantized in ((0, False), (1, True), (2, False)):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert (stored[name].dtype == torch.float8_e4m3fn) == is_quantized
        assert is_quantized or stored[name].equal(original[name])
    ignored = read_config(checkpoint)["quantization_config"]["ignore"]
    assert sorted(ignored) == ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]


def test_every_tensor_is_quantized_by_itself(
    saved: Callable[[str], Path], start_build: StartBuild, outputs_of: OutputsOf
) -> None:
    """The step adds nothing to `quant`, which has tests of its own: names, files, and no more."""
    build = start_build(saved("qwen2"), scheme="fp8")
    original = load_file(saved("qwen2") / "model.safetensors")
    expected = {}
    for name, tensor in original.items():
        own = find_scheme(build.plan.model.schemes.get(name, "none"))
        expected.update({own.stored_name(name, part): value for part, value in own.quantize(tensor).items()})
    stored = load_file(outputs_of(build, "quantize") / "model.safetensors")
    assert set(stored) == set(expected)
    for name, tensor in stored.items():
        assert tensor.view(torch.uint8).equal(expected[name].view(torch.uint8)), name


def test_without_quantization_the_source_is_the_checkpoint(
    saved: Callable[[str], Path], start_build: StartBuild, outputs_of: OutputsOf
) -> None:
    checkpoint = outputs_of(start_build(saved("llama")), "quantize")
    assert [path.name for path in checkpoint.iterdir()] == ["config.json"]
    assert read_config(checkpoint) == read_config(saved("llama"))


def test_weights_take_the_dtype_of_the_model(
    saved: Callable[[str], Path], start_build: StartBuild, outputs_of: OutputsOf, tmp_path: Path
) -> None:
    """A config.json that says bfloat16 over float32 files: what transformers would load is what is quantized."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes((saved("llama") / "model.safetensors").read_bytes())
    (model / "config.json").write_text(json.dumps({**read_config(saved("llama")), "dtype": "bfloat16"}))
    stored = load_file(outputs_of(start_build(model, scheme="int8"), "quantize") / "model.safetensors")
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", grid(["none", "fp8"], ["fp8"]))
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "lack 1 of 30 parameters: model.norm.weight"),
        (
            {"model.norm.weight": torch.zeros(65)},
            r"model.norm.weight has shape \[65\], the architecture asks for \[64\]",
        ),
    ],
    ids=["missing", "shape"],
)
def test_weights_of_another_model_are_refused_before_there_is_a_plan(
    scheme: str,
    change: dict[str, Tensor | None],
    message: str,
    saved: Callable[[str], Path],
    start_build: StartBuild,
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    changed = {**load_file(saved("llama") / "model.safetensors"), **change}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, model / "model.safetensors")
    (model / "config.json").write_bytes((saved("llama") / "config.json").read_bytes())
    with pytest.raises(UserError, match=message) as error:
        _ = start_build(model, scheme=scheme).plan
    assert error.value.where == str(model)
