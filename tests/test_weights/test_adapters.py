from __future__ import annotations

import json
from pathlib import Path

import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.weights.directory import ModelDirectory

LORA = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "acme/base"})


def test_an_adapter_beside_a_model_is_not_ignored(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert ModelDirectory(tmp_path).config() == {}
    (tmp_path / "adapter_config.json").write_text(LORA)
    with pytest.raises(UserError, match=r"has an adapter \(LORA\), which this version does not apply") as error:
        ModelDirectory(tmp_path).config()
    assert "merge_and_unload" in error.value.hint
    assert error.value.where == str(tmp_path / "adapter_config.json")


def test_an_adapter_alone_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(LORA)
    with pytest.raises(UserError, match=r"is an adapter \(LORA\) of 'acme/base' and not a model"):
        ModelDirectory(tmp_path).config()
