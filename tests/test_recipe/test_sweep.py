"""The points of a sweep are those of Hydra's own multirun, each composed and validated before any is built."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.recipe.sweep import sweep_points

HYDRA = """
import json
import hydra
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base="1.3", config_path=None)
def main(config):
    print(json.dumps(list(HydraConfig.get().overrides.task)))

main()
"""


def titles(*overrides: str) -> list[str]:
    return [point.title for point in sweep_points("quickstart", overrides)]


def test_the_points_are_those_of_hydra(tmp_path: Path) -> None:
    swept = [
        "model.num_hidden_layers=range(1,4)",
        "buckets.decode_buckets=[[1,512]],[[4,512]]",
        "scheduler.npu_queue_limit=choice(2,3)",
    ]
    script = tmp_path / "main.py"
    script.write_text(HYDRA)
    command = [sys.executable, script, "-m", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    command += [f"++{text}" for text in swept]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    theirs = [[text.removeprefix("++") for text in json.loads(line)] for line in ran.stdout.splitlines()]
    assert len(theirs) == 12
    assert [list(point.overrides) for point in sweep_points("quickstart", swept)] == theirs


def test_each_point_is_its_recipe() -> None:
    none, int8 = sweep_points("quickstart", ["quantization=none,int8", "model.num_hidden_layers=2"])
    assert [none.title, int8.title] == ["quantization=none", "quantization=int8"], "what all have is not told"
    assert (none.recipe.spec.quantization.scheme, int8.recipe.spec.quantization.scheme) == ("none", "int8")
    assert none.recipe.spec.model.num_hidden_layers == 2


def test_a_glob_finds_the_choices_of_a_group() -> None:
    assert titles("quantization=glob(int*)") == ["quantization=int4", "quantization=int8"]


def test_points_that_are_the_same_recipe_are_one() -> None:
    assert titles("quantization=int8,int8,none") == ["quantization=int8", "quantization=none"]


def test_without_several_values_there_is_one_point() -> None:
    assert titles("quantization=int8") == [""]


def test_a_mistake_is_told_with_its_points_and_all_at_once() -> None:
    with pytest.raises(UserError) as refused:
        sweep_points("quickstart", ["quantization=none,int5", "buckets.decode_buckets=[[1,512]],[[0,512]]"])
    text = str(refused.value)
    assert "in quantization=int5 buckets.decode_buckets=[[1,512]], quantization=int5" in text
    assert "there is no quantization 'int5'" in text
    assert "in quantization=none buckets.decode_buckets=[[0,512]]: " in text


def test_a_mistake_of_all_points_is_told_once() -> None:
    with pytest.raises(UserError) as refused:
        sweep_points("quickstart", ["quantization=none,int8", "model.num_layers=2"])
    assert str(refused.value).count("num_layers") == str(refused.value).split("\nin ")[0].count("num_layers")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("quantization=glob(x*)", ["there is nothing to build", "quantization=glob(x*)"]),
        ("num_compile_workers=1,2", ["num_compile_workers cannot be swept", "changes nothing of an artifact"]),
        ("hydra/sweeper=optuna", ["would configure Hydra"]),
        ("quantization=none,int8=", ["is not an override"]),
    ],
)
def test_what_is_no_sweep_is_refused(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        sweep_points("quickstart", [override])
    assert all(word in str(refused.value) for word in words)
