"""A quantized checkpoint as a user gives it: what is taken, what is refused, what it makes run again.

tests/test_end_to_end/test_quantized_checkpoint.py compares the numbers.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import save_quantized
from safetensors.torch import load_file, save_file
from torch import Tensor
from user_directory import (
    CONFIG,
    UserDirectory,
    furiosa_build,
    make_new_directory,
    make_user_directory,
    steps_in_this_process,
)

from furiosa_build.core.errors import UserError
from furiosa_build.weights.directory import ModelDirectory

from .unsupported import REFUSED, Edit, of_weights, second_group

TAKEN = "quantization.quantize_artifact_path=quantized"
PROJECTION = "model.layers.0.self_attn.q_proj"
WEIGHTS = ["fetch", "quantize", "partition:weights", "package", "qualify"]


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """A directory in which a quantized checkpoint, its root's `quantized`, has been built. Not to be changed."""
    user = make_new_directory(tmp_path_factory.mktemp("quantized"))
    save_quantized(user.root / "tiny", user.root / "quantized", "fp8-tensor-dynamic")
    with steps_in_this_process():
        assert user.build(TAKEN)
    return user


@pytest.fixture
def user(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """The same, to be changed."""
    shutil.copytree(built.store, tmp_path / "store")
    directory = make_user_directory(tmp_path / "user", tmp_path / "store", built.root / "tiny")
    shutil.copytree(built.root / "quantized", directory.root / "quantized")
    assert directory.build(TAKEN) == []
    return directory


def edit_config(directory: Path, edit: Edit) -> None:
    config = json.loads((directory / "config.json").read_text())
    edit(config)
    (directory / "config.json").write_text(json.dumps(config))


def edit_weights(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


# What is built


def test_the_artifact_and_the_plan_tell_which_checkpoint_was_taken(user: UserDirectory) -> None:
    artifact = user.latest()
    assert artifact.model_metadata.quantization == "fp8-tensor-dynamic"
    assert "quantization_config" not in artifact.hf_config
    ran = furiosa_build(user, "plan", "tiny", TAKEN)
    assert ran.status == 0
    assert "float32, fp8-tensor-dynamic, 14 weights\n" in ran.out
    described = "fp8 weights with one scale, activations rounded to fp8 per token"
    assert f"quantized checkpoint quantized: {described}\n" in ran.out
    assert "quantized is quantized: check its 14 fp8-tensor-dynamic weights" in ran.out
    assert ran.out.endswith("0 to do\n")


def test_the_models_own_weights_are_not_needed(user: UserDirectory) -> None:
    (user.root / "tiny" / "model.safetensors").unlink()
    assert user.build(TAKEN) == []
    shutil.rmtree(user.store)
    assert set(WEIGHTS) < set(user.build(TAKEN))


def test_the_checkpoint_may_be_the_model_itself(user: UserDirectory) -> None:
    """It has a config.json and a tokenizer as well."""
    before = user.latest().model_metadata.weights_digest
    assert user.build(TAKEN, "model.model_id_or_path=quantized") == ["fetch", "package", "qualify"]
    assert user.latest().model_metadata.weights_digest == before


def test_a_checkpoint_elsewhere_is_the_same(user: UserDirectory, tmp_path: Path) -> None:
    moved = (user.root / "quantized").rename(tmp_path / "quantized")
    assert user.build(f"quantization.quantize_artifact_path={moved}") == []


def test_a_checkpoint_in_two_files_is_the_same_parameters(user: UserDirectory) -> None:
    def parameters() -> dict[str, bytes]:
        files = (user.artifacts / "latest" / "params").iterdir()
        return {file.name: file.read_bytes() for file in files}

    assert user.build(TAKEN, "verify_inputs=true") == []
    before, directory = parameters(), user.root / "quantized"
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):  # a weight and its scale in different files
        save_file({name: tensors[name] for name in part}, directory / f"model-{number}.safetensors")
        weight_map.update(dict.fromkeys(part, f"model-{number}.safetensors"))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert user.build(TAKEN)
    assert parameters() == before


def test_of_a_model_on_the_hub_no_weights_are_fetched(
    user: UserDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = tmp_path / ("c" * 40)
    shutil.copytree(user.root / "tiny", commit)
    asked: set[str] = set()

    def download(request: dict[str, Any]) -> dict[str, str]:
        asked.update(request["patterns"])
        return {"directory": str(commit)}

    monkeypatch.setattr("furiosa_build.weights.hub._in_process", download)
    assert user.build(TAKEN, "model.model_id_or_path=org/model") == ["fetch", "package", "qualify"]
    assert "config.json" in asked
    assert not any("safetensors" in pattern for pattern in asked)
    assert user.latest().model_metadata.revision == commit.name


def test_other_weights_are_built_again(user: UserDirectory) -> None:
    edit_weights(user.root / "quantized", lambda tensors: tensors[f"{PROJECTION}.weight_scale"].mul_(0.5))
    assert sorted(user.build(TAKEN)) == sorted(WEIGHTS)
    assert user.build(TAKEN) == []


def test_a_file_that_changes_meanwhile_is_noticed(user: UserDirectory) -> None:
    """The steps after `fetch` read it where it lies."""
    edit_weights(user.root / "quantized", lambda tensors: tensors[f"{PROJECTION}.weight_scale"].mul_(0.5))
    build = user.open(TAKEN)
    build.run("fetch")
    edit_weights(user.root / "quantized", lambda tensors: tensors[f"{PROJECTION}.weight_scale"].mul_(0.5))
    with pytest.raises(UserError, match=r"model\.safetensors has changed since it was fetched"):
        build.run("quantize")


def test_the_artifact_shares_no_file_with_the_checkpoint(user: UserDirectory) -> None:
    """Whoever edits the checkpoint edits no artifact, and no file of the store."""
    assert (user.root / "quantized" / "model.safetensors").stat().st_nlink == 1


def test_another_scheme_of_the_same_bytes(user: UserDirectory) -> None:
    """Without rounded activations: config.json alone says so."""

    def unrounded(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None

    edit_config(user.root / "quantized", unrounded)
    ran = user.build(TAKEN)
    assert "fetch" not in ran
    assert {"quantize", "partition:weights", "compile:prefill-1x32:block", "package", "qualify"} <= set(ran)
    assert user.latest().model_metadata.quantization == "fp8-tensor"


# What is refused before any work, by config.json


def refused(user: UserDirectory, *overrides: str) -> str:
    """The message of a build that ends with status 2 and writes nothing but what a plan is made from."""

    def files() -> set[Path]:
        actions = (user.store / "actions").rglob("manifest.json")
        steps = {path for path in actions if json.loads(path.read_bytes())["step"] != "loading"}
        return {*(user.root / "artifacts").rglob("*"), *steps}

    before = files()
    ran = furiosa_build(user, "build", "tiny", *overrides)
    assert (ran.status, files()) == (2, before), ran.err
    assert "Traceback" not in ran.err
    return ran.err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([TAKEN, "quantization=fp8"], ["quantize_artifact_path='quantized' is quantized already: scheme='fp8'"]),
        (
            [TAKEN, "+quantization.rules=[{match: lm_head.weight, scheme: none}]"],
            ["rules have no effect", "without rules"],
        ),
        ([TAKEN, "model.seed_for_random_weight=1"], ["draws weights", "model.seed_for_random_weight"]),
        (["quantization.quantize_artifact_path=nowhere"], ["quantized checkpoint 'nowhere' does not exist"]),
        (["quantization.quantize_artifact_path=recipes"], ["the quantized checkpoint has no config.json"]),
        (["quantization.quantize_artifact_path=tiny"], ["is not quantized", "model.model_id_or_path"]),
        (["model.model_id_or_path=quantized"], ["quantized already", TAKEN.replace("=quantized", "=DIRECTORY")]),
    ],
    ids=["scheme", "rules", "seed", "nowhere", "empty", "unquantized", "as a model"],
)
def test_a_mistake_in_the_recipe(user: UserDirectory, overrides: list[str], words: list[str]) -> None:
    message = refused(user, *overrides)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen3"}, "model_type='qwen3', the model's 'llama'"),
        ({"hidden_size": 64}, "hidden_size=64, the model's 32"),
        ({"num_hidden_layers": 1}, "num_hidden_layers=1, the model's 2"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3, the model's 2"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4, the model's 2"),
        ({"rms_norm_eps": 0.5}, "rms_norm_eps=0.5, the model's 1e-06"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16', the model's 'float32'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_model(user: UserDirectory, change: dict[str, Any], words: str) -> None:
    edit_config(user.root / "quantized", lambda config: config.update(change))
    message = refused(user, TAKEN)
    assert "the quantized checkpoint is of another model" in message
    assert words in message


def test_a_weight_file_that_is_missing(user: UserDirectory) -> None:
    (user.root / "quantized" / "model.safetensors").unlink()
    assert "has no weights" in refused(user, TAKEN)


@pytest.mark.parametrize(("edit", "words"), REFUSED.values(), ids=REFUSED)
def test_a_scheme_that_cannot_be_computed(built: UserDirectory, tmp_path: Path, edit: Edit, words: str) -> None:
    """One message that names the key, the value, and what is valid."""
    config = json.loads((built.root / "quantized" / "config.json").read_text())
    edit(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        ModelDirectory(tmp_path).quantization(CONFIG, None)
    assert words in error.value.what
    assert error.value.valid
    assert error.value.where.startswith(f"{tmp_path / 'config.json'}, quantization_config.")


OLDER: dict[str, Edit] = {
    "frozen": lambda config: config["quantization_config"].update(quantization_status="frozen"),
    "no status": lambda config: config["quantization_config"].pop("quantization_status"),
    "its old name": lambda config: config.update(compression_config=config.pop("quantization_config")),
    "not sparse": lambda config: config["quantization_config"].update(
        sparsity_config={"format": "dense", "global_sparsity": 0.1, "ignore": ["lm_head"]}
    ),
}


@pytest.mark.parametrize("label", OLDER)
def test_labels_of_older_tools_say_the_same(built: UserDirectory, tmp_path: Path, label: str) -> None:
    config = json.loads((built.root / "quantized" / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    expected = ModelDirectory(tmp_path).quantization(CONFIG, None)
    OLDER[label](config)
    path.write_text(json.dumps(config))
    assert ModelDirectory(tmp_path).quantization(CONFIG, None) == expected


def test_a_scheme_is_refused_before_any_work(user: UserDirectory) -> None:
    edit_config(user.root / "quantized", lambda config: of_weights(num_bits=4)(config["quantization_config"]))
    assert re.search(r"weights\.num_bits=4\n  where: .*quantized/config\.json.*\n  valid: 8", refused(user, TAKEN))


def test_what_quantizes_nothing_of_the_model_is_refused(user: UserDirectory) -> None:
    edit_config(user.root / "quantized", lambda config: config["quantization_config"].update(ignore=["re:.*"]))
    assert "quantizes no linear layer of LlamaForCausalLM" in refused(user, TAKEN)


def test_groups_have_schemes_of_their_own(built: UserDirectory, tmp_path: Path) -> None:
    config = json.loads((built.root / "quantized" / "config.json").read_text())
    group = second_group(config["quantization_config"], type="int")
    group.update(format="pack-quantized", input_activations=None, targets=[r"re:.*layers\.1\.", "lm_head"])
    config["quantization_config"].update(format="mixed-precision", ignore=[f"{PROJECTION}"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = ModelDirectory(tmp_path).quantization(CONFIG, None)
    assert checkpoint.scheme_of("model.layers.0.mlp.up_proj.weight") == "fp8-tensor-dynamic"
    assert checkpoint.scheme_of("model.layers.1.mlp.up_proj.weight") == "int8-tensor"
    assert checkpoint.scheme_of("lm_head.weight") == "int8-tensor"
    assert checkpoint.scheme_of(f"{PROJECTION}.weight") == "none"
    assert checkpoint.described == (
        "fp8 weights with one scale, activations rounded to fp8 per token; "
        "int8 weights with one scale, activations as they are"
    )


# What the quantize step finds in the weights


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


SPOILED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no scale": (lambda tensors: tensors.pop(f"{PROJECTION}.weight_scale"), f"lacks {PROJECTION}.weight_s"),
    "packed after all": (
        renamed(f"{PROJECTION}.weight", f"{PROJECTION}.weight_packed"),
        f"lacks {PROJECTION}",
    ),
    "no norm": (lambda tensors: tensors.pop("model.norm.weight"), "lacks model.norm.weight"),
    "static scale": (put(f"{PROJECTION}.input_scale", torch.ones(1)), f"has {PROJECTION}.input_scale"),
    "a scale of the head": (put("lm_head.weight_scale", torch.ones(64, 1)), "has lm_head.weight_scale"),
    "a norm of another model": (put("model.layers.1.q_norm.weight", torch.ones(8)), "has model.layers.1"),
    "unquantized": (put(f"{PROJECTION}.weight", torch.ones(32, 32)), f"{PROJECTION}.weight of the quantized"),
    "another shape": (
        put(f"{PROJECTION}.weight", torch.ones(16, 32).to(torch.float8_e4m3fn)),
        "has shape [16, 32]\n",
    ),
    "a scale per channel": (put(f"{PROJECTION}.weight_scale", torch.ones(32, 1)), "has shape [32, 1]\n"),
    "a scale of whole numbers": (
        put(f"{PROJECTION}.weight_scale", torch.ones(1, dtype=torch.int32)),
        "has dtype int32\n",
    ),
    "a quantized head": (
        put("lm_head.weight", torch.ones(64, 32).to(torch.float8_e4m3fn)),
        "lm_head.weight of the quantized checkpoint has dtype float8_e4m3fn",
    ),
}


@pytest.mark.parametrize(("edit", "words"), SPOILED.values(), ids=SPOILED)
def test_weights_that_are_not_what_config_json_says(
    user: UserDirectory, edit: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    edit_weights(user.root / "quantized", edit)
    build = user.open(TAKEN)
    build.run("fetch")
    with pytest.raises(UserError) as error:
        build.run("quantize")
    assert words in str(error.value)
    assert str(user.root / "quantized") in error.value.where


def test_a_packed_weight_says_its_shape(user: UserDirectory) -> None:
    directory = save_quantized(user.root / "tiny", user.root / "packed", "int8")
    edit_weights(directory, put(f"{PROJECTION}.weight_shape", torch.tensor([32, 31])))
    build = user.open("quantization.quantize_artifact_path=packed")
    build.run("fetch")
    with pytest.raises(UserError, match=r"weight_shape of the quantized checkpoint says \[32, 31\]") as error:
        build.run("quantize")
    assert error.value.valid == "[32, 32]"


def test_tensors_of_no_use_are_no_mistake(user: UserDirectory) -> None:
    """What older versions of transformers wrote along, and further layers."""

    def along(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.2.mlp.up_proj.weight_zero_point"] = torch.ones(4)

    edit_weights(user.root / "quantized", along)
    assert sorted(user.build(TAKEN)) == ["fetch", "package", "partition:weights", "qualify", "quantize"]
