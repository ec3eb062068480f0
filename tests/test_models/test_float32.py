"""Parameters that a model's class keeps in float32 have that dtype, as `from_pretrained` gives it to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from grid import grid
from test_end_to_end.test_every_family import FAMILIES
from transformers import AutoModelForCausalLM

from furiosa_build.models.skeleton import Skeleton

KEPT = [
    *(("afmoe", "float16"), ("gpt_oss", "float16"), ("ernie4_5_moe", "bfloat16"), ("glm4_moe", "bfloat16")),
    *((model_type, "bfloat16") for model_type in ("deepseek_v3", "dots1", "exaone_moe", "flint", "glm4_moe_lite")),
    *((model_type, "bfloat16") for model_type in ("hy_v3", "kolibri1", "mimo_v2_flash", "solar_open")),
]
"""The families that docs/models.md calls equal, with a dtype under which some of their parameters are kept."""


@pytest.mark.parametrize(("model_type", "dtype"), grid(KEPT, [("gpt_oss", "float16"), ("ernie4_5_moe", "bfloat16")]))
def test_parameters_that_are_kept_in_float32(model_type: str, dtype: str, tmp_path: Path) -> None:
    config = {**FAMILIES.smallest(model_type), "dtype": dtype}
    FAMILIES._save(config, tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    named = {**dict(expected.named_buffers()), **dict(expected.named_parameters())}
    found = {name: parameter.dtype for name, parameter in Skeleton(config).model.named_parameters()}
    assert found == {name: named[name].dtype for name in found}
    assert set(found.values()) == {torch.float32, getattr(torch, dtype)}
