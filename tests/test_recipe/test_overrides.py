"""Overrides: values that Hydra does not take as they are, lists, and what devices choose."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.recipe.compose import load_recipe
from furiosa_build.recipe.overrides import quoted
from furiosa_build.recipe.schema import BuildSpec

from .conftest import VALID, Write

TEXTS = [
    "epoch=9-step=8",
    "pct_%r",
    "a@b",
    "a#b",
    "模型",
    "a,b",
    "a b",
    "a[1]",
    "[1",
    "back\\slash",
    "trailing\\",
    "back\\\\'\"slash",
    "it's",
    'q"q',
    "'quoted'",
    "(x)",
    "a{b}",
    "$HOME",
    "~tilde",
    "null",
    "1.0",
    "true",
    " spaces ",
    "",
    "new\nline",
    "é😀",
    "a:b=c",
]
KEY = "model.model_id_or_path"


def spec_of(tmp_path: Path, *overrides: str, name: str = "quickstart") -> BuildSpec:
    return load_recipe(name, overrides, cwd=tmp_path).spec


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
def test_a_hint_can_be_copied_into_the_shell(tmp_path: Path, text: str) -> None:
    """Whatever the value is: it is taken as it is, or the message has the line that sets it."""
    try:
        found = spec_of(tmp_path, f"{KEY}={text}")
    except UserError as error:
        hints = str(error).partition("hint: ")[2]
        assert quoted(KEY, text) in hints
        [copied] = shlex.split(quoted(KEY, text))
        found = spec_of(tmp_path, copied)
    assert found.model.model_id_or_path == text.strip(" '")  # blanks around it, and quotes, are Hydra's


@pytest.mark.parametrize("text", TEXTS)
def test_a_quoted_text_is_the_text(tmp_path: Path, text: str) -> None:
    [override] = shlex.split(quoted("save_dir", text))
    assert load_recipe("quickstart", [override], cwd=tmp_path).options.save_dir == text


def test_a_key_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'buckets.decode_buckets\[0\]' is not a key"):
        spec_of(tmp_path, "buckets.decode_buckets[0]=[2,512]")


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("devices=npu:0:0-1,npu:1:0", "devices=[npu:0:0-1,npu:1:0]"),
        ("devices=npu:0,npu:1", "devices='npu:0,npu:1'"),
        ("buckets.decode_buckets=[1,128],[4,128]", "buckets.decode_buckets=[[1,128],[4,128]]"),
        ("++buckets.append_buckets=[1,8,128],[1,16,128]", "buckets.append_buckets=[[1,8,128],[1,16,128]]"),
        ("parallel.num_blocks_per_pp_stage=1,2", "parallel.num_blocks_per_pp_stage=[1,2]"),
    ],
)
def test_a_list_may_be_given_with_commas(tmp_path: Path, override: str, same: str) -> None:
    assert spec_of(tmp_path, override) == spec_of(tmp_path, same)


@pytest.mark.parametrize("override", ["devices=choice(npu:0,npu:1)", "buckets=small,medium", "name=a,b"])
def test_a_sweep_stays_one(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match="gives several values; a build takes one"):
        spec_of(tmp_path, override)


# Devices choose the target


@pytest.mark.parametrize("devices", ["npu:0:*", "npu:0", "npu:0,npu:1", "npu:1:0-3"])
def test_an_npu_chooses_the_target_that_has_it(tmp_path: Path, devices: str) -> None:
    spec = spec_of(tmp_path, f"devices={devices}", "target.memory_gb=24")
    assert (spec.target.name, spec.target.num_elements, spec.target.memory_gb) == ("rngd", 8, 24)
    assert spec == spec_of(tmp_path, "target=rngd", f"devices={devices}", "target.memory_gb=24")


def test_a_recipe_of_an_npu_needs_no_target(tmp_path: Path, write: Write) -> None:
    write("recipes/mine.yaml", VALID + "devices: npu:0:0-1\n")
    assert spec_of(tmp_path, name="mine").target.name == "rngd"
    assert spec_of(tmp_path, "devices=cpu", name="mine").target.name == "cpu"


def test_a_target_that_was_chosen_stays(tmp_path: Path, write: Write) -> None:
    write("recipes/mine.yaml", VALID + "  - override target: x86-64-v4\n")
    for name, overrides in (("quickstart", ("target=cpu", "devices=npu:0")), ("mine", ("devices=npu:0",))):
        with pytest.raises(UserError, match="is not an NPU"):
            spec_of(tmp_path, *overrides, name=name)


def test_a_users_target_is_chosen_where_it_alone_has_the_devices(tmp_path: Path, write: Write) -> None:
    write("conf/target/large.yaml", "# A large NPU.\nname: large\nnum_elements: 16\n")
    assert spec_of(tmp_path, "devices=npu:0:8-15").target.name == "large"
    with pytest.raises(UserError, match=r"several targets with devices='npu:0'") as caught:
        spec_of(tmp_path, "devices=npu:0")
    assert caught.value.valid == "target=large or target=rngd"
    assert caught.value.where == "command line: devices=npu:0"
