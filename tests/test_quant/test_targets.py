"""Which layers the targets and groups of a checkpoint's config mean: as compressed-tensors itself says."""

from __future__ import annotations

import pytest
import torch
from quantized import library_scheme

from furiosa_build.quant.compressed_tensors import QuantizedCheckpoint


@pytest.mark.parametrize(
    ("targets", "ignore", "quantized"),
    [
        (["Linear"], [], ["a.b", "lm_head"]),
        (["Linear"], ["lm_head"], ["a.b"]),
        (["re:.*b$"], [], ["a.b"]),
        (["re:b"], [], []),  # a pattern is for the beginning of a name
        (["a.b"], [], ["a.b"]),
        (["Linear"], ["re:a"], ["lm_head"]),
        (["Linear"], ["a"], ["a.b", "lm_head"]),
        (["Linear"], ["Linear"], []),
        (["Linear"], ["Embedding"], ["a.b", "lm_head"]),
    ],
)
def test_targets_mean_what_compressed_tensors_says(targets: list[str], ignore: list[str], quantized: list[str]) -> None:
    from compressed_tensors.utils.match import match_named_modules

    model = torch.nn.ModuleDict(
        {"a": torch.nn.ModuleDict({"b": torch.nn.Linear(1, 1)}), "lm_head": torch.nn.Linear(1, 1)}
    )
    theirs = [name for name, _ in match_named_modules(model, targets, ignore)]
    checkpoint = QuantizedCheckpoint(dict.fromkeys(targets, "fp8"), tuple(ignore))
    assert [name for name in ("a.b", "lm_head") if checkpoint.scheme_of(f"{name}.weight") == "fp8"] == quantized
    assert sorted(theirs) == quantized


@pytest.mark.parametrize(
    "groups",
    [
        [["Linear"], ["a.b"]],
        [["a.b"], ["Linear"]],
        [["re:.*"], ["Linear"], ["a.c"]],
        [["re:a.*"], ["re:a\\.c"], ["lm_head"]],
        [["Linear"], ["Linear"]],
        [["re:.*b", "Linear"], ["re:a"]],
    ],
)
def test_which_of_several_groups_a_layer_belongs_to_is_what_compressed_tensors_says(groups: list[list[str]]) -> None:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    def linear() -> torch.nn.Linear:
        return torch.nn.Linear(8, 8)

    inner = torch.nn.ModuleDict({"b": linear(), "c": linear()})
    model = torch.nn.ModuleDict({"a": inner, "lm_head": linear()})
    forms = ["int8", "int8-tensor", "fp8"]
    config = {
        f"group_{number}": library_scheme(form).model_copy(update={"targets": targets})
        for number, (form, targets) in enumerate(zip(forms, groups, strict=False))
    }
    apply_quantization_config(model, QuantizationConfig(config_groups=config), show_progress=False)
    found = {target: form for form, targets in zip(forms, groups, strict=False) for target in targets}
    checkpoint = QuantizedCheckpoint(found, ())
    for name in ("a.b", "a.c", "lm_head"):
        expected = getattr(model.get_submodule(name), "quantization_scheme", None)
        own = checkpoint.scheme_of(f"{name}.weight")
        assert (None if own == "none" else library_scheme(own).weights) == (expected and expected.weights), name
