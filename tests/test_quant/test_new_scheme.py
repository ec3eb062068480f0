"""A scheme of another package, this file: built, divided and qualified, with nothing else that knows of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from test_models.tiny import LLAMA, load, save_random_model
from torch import Tensor

from furiosa_build.build.build import Build
from furiosa_build.core.errors import UserError
from furiosa_build.ir.tensors import Layout
from furiosa_build.quant.scheme import QuantScheme
from furiosa_build.recipe.schema import QuantizationSpec

StartBuild = Callable[..., Build]

MODEL = {**LLAMA, "num_hidden_layers": 2}
BUCKETS = {"prefill_buckets": [[1, 32]], "decode_buckets": [[2, 64]], "max_seq_len_to_capture": 64}
GROUP = 16


@dataclass(frozen=True)
class Nibbles(QuantScheme):
    """4-bit weights, two in a byte, with a scale for each group of 16 columns."""

    family = "nibbles"
    scales = ("weight_scale",)

    @property
    def described(self) -> str:
        return "4-bit weights with a scale per group"

    def parts(self, weight: Layout) -> dict[str, Layout]:
        rows, columns = weight.shape
        return {
            "weight_nibbles": Layout("uint8", (rows, columns // 2)),
            "weight_scale": Layout(weight.dtype, (rows, columns // GROUP)),
        }

    def refusal(self, weight: Layout) -> str:
        return "" if weight.shape[1] % GROUP == 0 else f"{weight.shape[1]} columns are not whole groups of {GROUP}"

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        groups = weight.unflatten(1, (-1, GROUP))
        scale = groups.abs().amax(-1) / 7
        numbers = (groups / scale.unsqueeze(-1)).round().to(torch.int32).flatten(1) + 8
        return {"weight_nibbles": (numbers[:, ::2] + 16 * numbers[:, 1::2]).to(torch.uint8), "weight_scale": scale}

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        packed = stored["weight_nibbles"].to(torch.int32)
        numbers = torch.stack([packed % 16, packed // 16], dim=-1).flatten(1) - 8
        groups = numbers.unflatten(1, (-1, GROUP)).to(dtype)
        return (groups * stored["weight_scale"].to(dtype).unsqueeze(-1)).flatten(1)

    def product(self, x: Tensor, operands: Sequence[Tensor]) -> Tensor:
        nibbles, scale = operands
        return x @ self.dequantize({"weight_nibbles": nibbles, "weight_scale": scale}, x.dtype).mT

    def config_group(self) -> dict[str, Any]:
        return {"format": "nibbles", "weights": {"num_bits": 4, "strategy": "group", "group_size": GROUP}}


@pytest.fixture(autouse=True)
def _registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point that the package of such a scheme has, for this process and for those that it starts."""
    site = tmp_path / "site"
    info = site / "nibbles-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nibbles\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[furiosa_build.quant_schemes]\nnibbles = {__name__}:Nibbles\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(Path(__file__).parents[1])]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(MODEL, tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.grid
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_builds_and_qualifies(ranks: int, model: Path, start_build: StartBuild) -> None:
    keep_head = ({"match": "lm_head.weight", "scheme": "none"},)
    parallel = {"tensor_parallel_size": ranks}
    build = start_build(model, scheme="nibbles", rules=keep_head, parallel=parallel, **BUCKETS)
    assert build.plan.steps["quantize"].description == "quantize 14 weights to nibbles"
    for step in build.plan.steps:
        build.run(step)
    artifact = build.version_directory
    assert json.loads((artifact / "artifact.json").read_text())["model_metadata"]["quantization"] == "nibbles"

    # Every rank's share of a projection, put together, is the whole as it is quantized.
    weight, prefix = "weight_nibbles", "model.layers.1."
    original = dict(load(model).named_parameters())
    for name, dim in (("mlp.up_proj", 0), ("mlp.down_proj", 1)):
        shares = []
        for rank in range(ranks):
            [file] = (artifact / "params").glob(f"*rank-{rank}-*")
            shares.append(load_file(file))
        whole = Nibbles().quantize(original[f"{prefix}{name}.weight"].detach())
        for part in (weight, "weight_scale"):
            assert torch.cat([share[f"{prefix}{name}.{part}"] for share in shares], dim=dim).equal(whole[part])


def test_its_package_is_in_the_keys_of_the_steps_that_use_it(model: Path, start_build: StartBuild) -> None:
    def tools(scheme: str) -> dict[str, str]:
        build = start_build(model, scheme=scheme, **BUCKETS)
        factors, _ = build._factors.known(build.plan, build.plan.steps["quantize"])
        return factors["tools"]  # type: ignore[no-any-return]

    assert tools("nibbles")["nibbles"] == "1.2"
    assert "nibbles" not in tools("fp8")


def test_what_it_refuses_is_said_before_any_work(start_build: StartBuild) -> None:
    small = {**MODEL, "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64}
    with pytest.raises(UserError) as error:
        start_build(small, scheme="nibbles", parallel={"tensor_parallel_size": 8}, **BUCKETS).plan  # noqa: B018
    assert error.value.what == (
        "model.layers.0.mlp.down_proj.weight cannot be quantized to nibbles for 8 ranks: "
        "12 columns are not whole groups of 16"
    )


def test_a_mistake_in_its_name_is_told_with_all_names() -> None:
    assert QuantizationSpec(scheme="nibbles").scheme == "nibbles"
    with pytest.raises(ValidationError, match="'none', 'fp8', 'int4', 'int8' or 'nibbles'"):
        QuantizationSpec(scheme="nibble")
