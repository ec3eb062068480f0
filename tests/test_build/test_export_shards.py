"""`furiosa-build shard`: parameter files and metadata alone. That ranks compute with them: test_end_to_end."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import save_quantized
from safetensors import safe_open
from safetensors.torch import load_file
from test_end_to_end.test_parallel import MODELS
from test_models.tiny import save_random_model
from user_directory import Ran, UserDirectory, furiosa_build, make_user_directory, steps_in_this_process

from furiosa_build.backends.inductor import InductorBackend
from furiosa_build.build import export_shards, graph
from furiosa_build.build.reporter import EventReporter

STEPS = ["fetch", "quantize", "partition:weights"]
DIVIDED = ("parallel.tensor_parallel_size=4", "parallel.pipeline_parallel_size=2")


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 heads and 2 KV heads, so that with 4 ranks two share each; 3 layers."""
    return save_random_model(MODELS["llama"], tmp_path_factory.mktemp("sharding") / "tiny")


@pytest.fixture
def user(tmp_path: Path, model: Path) -> UserDirectory:
    """Nothing has been built."""
    return make_user_directory(tmp_path / "user", tmp_path / "store", model)


def shard(user: UserDirectory, *arguments: str, output: str = "out") -> Ran:
    return furiosa_build(user, "shard", "tiny", "--output", output, *arguments)


def read_metadata(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / export_shards.METADATA_FILE).read_bytes()))


def whole(directory: Path, described: dict[str, Any]) -> torch.Tensor:
    """A stored tensor of a parameter, put together from what metadata.json says of its shards and nothing else."""
    parts = {}
    for held in described["shards"]:
        [(tensor, at)] = [item for item in held["tensors"].items() if item[0].endswith("weight")]
        with safe_open(directory / at["file"], framework="pt") as file:
            part = file.get_tensor(tensor)
        assert list(part.shape) == at["shape"]
        part = part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part
        begin = held.get("begin", 0)
        assert torch.equal(parts.setdefault(begin, part), part), "ranks that share a part have the same"
    dim = (described["cut"] or {}).get("dim", 0)
    return torch.cat([part for _, part in sorted(parts.items())], dim)


@pytest.mark.parametrize("divided", [(), ("parallel.tensor_parallel_size=2",), DIVIDED], ids=["whole", "2", "4x2"])
def test_the_parts_of_a_parameter_are_the_parameter(user: UserDirectory, model: Path, divided: tuple[str, ...]) -> None:
    assert shard(user, *divided).status == 0
    metadata, source = read_metadata(user.root / "out"), load_file(model / "model.safetensors")
    assert set(metadata["parameters"]) == set(source)
    for name, described in metadata["parameters"].items():
        assert (described["dtype"], described["shape"]) == ("float32", list(source[name].shape))
        assert torch.equal(whole(user.root / "out", described), source[name]), name


def test_the_parts_of_a_quantized_parameter_are_the_rows_and_columns_of_the_checkpoint(user: UserDirectory) -> None:
    assert shard(user, "quantization=fp8", *DIVIDED).status == 0
    assert shard(user, "quantization=fp8", output="one").status == 0
    divided, alone = (read_metadata(user.root / name)["parameters"] for name in ("out", "one"))
    cuts = {}
    for name, described in divided.items():
        assert torch.equal(whole(user.root / "out", described), whole(user.root / "one", alone[name])), name
        if described["quantization"] == "fp8":
            cuts[name.split(".")[-2]] = described["cut"]
    assert cuts["up_proj"] == {"how": "rows", "dim": 0}
    assert cuts["down_proj"] == {"how": "columns", "dim": 1}


def test_the_metadata_describe_the_files_and_the_model(user: UserDirectory) -> None:
    assert shard(user, *DIVIDED).status == 0
    metadata = read_metadata(user.root / "out")
    names = {f"stage-{stage}-rank-{rank}-00001-of-00001.safetensors" for stage in range(2) for rank in range(4)}
    assert set(metadata["files"]) == names == {path.name for path in (user.root / "out").iterdir()} - {"metadata.json"}
    for name, described in metadata["files"].items():
        content = (user.root / "out" / name).read_bytes()
        assert described == {
            "stage": int(name.split("-")[1]),
            "rank": int(name.split("-")[3]),
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert (metadata["tensor_parallel_size"], metadata["pipeline_parallel_size"]) == (4, 2)
    assert metadata["stages"] == [[0, 1], [2]]
    assert metadata["model"]["architecture"] == "LlamaForCausalLM"
    assert metadata["hf_config"]["num_hidden_layers"] == 3
    kv = metadata["parameters"]["model.layers.2.self_attn.k_proj.weight"]
    assert [(held["stage"], held["rank"], held["begin"]) for held in kv["shards"]] == [
        (1, 0, 0),
        (1, 1, 0),
        (1, 2, kv["shape"][0] // 2),
        (1, 3, kv["shape"][0] // 2),
    ], "2 KV heads, each for two ranks"
    assert metadata["parameters"]["model.norm.weight"]["cut"] is None


def test_the_files_are_those_of_the_artifact_by_hard_link(user: UserDirectory) -> None:
    assert shard(user, *DIVIDED).status == 0
    ran = user.build(*DIVIDED)
    assert not set(STEPS) & set(ran)
    params = user.artifacts / "latest" / "params"
    assert {path.name for path in params.iterdir()} == set(read_metadata(user.root / "out")["files"])
    for path in params.iterdir():
        assert path.samefile(user.root / "out" / path.name)
    metadata = read_metadata(user.root / "out")
    assert metadata["model"]["weights_digest"] == user.latest().model_metadata.weights_digest


def test_only_weights_are_worked_on_and_only_once(user: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a compiler asked for."""

    def missing(_: InductorBackend) -> None:
        raise AssertionError("a compiler is not needed")

    monkeypatch.setattr(InductorBackend, "check_toolchain", missing)
    first = shard(user, "backend=inductor", "--tensor-parallelism-size", "2")
    assert [line.split()[1] for line in first.out.splitlines() if line.startswith("[")] == STEPS
    assert "shards     out (2 files, " in first.out
    assert "ran 3 of 3 steps" in first.out
    assert not user.artifacts.exists()
    before = {path: path.stat().st_mtime_ns for path in (user.root / "out").iterdir()}
    second = shard(user, "backend=inductor", "parallel.tensor_parallel_size=2")
    assert second.status == 0
    assert "there already" in second.out
    assert "ran 0 of 3 steps" in second.out
    assert {path: path.stat().st_mtime_ns for path in (user.root / "out").iterdir()} == before


def strange(directory: Path) -> None:
    directory.mkdir()
    (directory / "thesis.tex").touch()


def a_file(directory: Path) -> None:
    directory.touch()


@pytest.mark.parametrize("make", [strange, a_file])
def test_what_is_there_already_is_refused_before_the_work(user: UserDirectory, make: Callable[[Path], None]) -> None:
    make(user.root / "out")
    ran = shard(user)
    assert ran.status == 2
    assert str(user.root / "out") in ran.err
    assert "where: --output" in ran.err
    assert not user.store.exists()


def other_metadata(user: UserDirectory) -> str:
    os.truncate(user.root / "out" / "metadata.json", 5)
    return "metadata.json"


def one_more(user: UserDirectory) -> str:
    (user.root / "out" / "one.safetensors").touch()
    return "one.safetensors"


def one_less(user: UserDirectory) -> str:
    (user.root / "out" / "stage-0-rank-0-00001-of-00001.safetensors").unlink()
    return "no stage-0-rank-0-00001-of-00001.safetensors"


@pytest.mark.parametrize("spoil", [other_metadata, one_more, one_less])
def test_other_shards_are_not_replaced(user: UserDirectory, spoil: Callable[[UserDirectory], str]) -> None:
    assert shard(user).status == 0
    found = spoil(user)
    before = {path: path.stat().st_mtime_ns for path in (user.root / "out").iterdir()}
    ran = shard(user)
    assert ran.status == 2
    assert f"holds something else: {found}\n" in ran.err
    assert {path: path.stat().st_mtime_ns for path in (user.root / "out").iterdir()} == before


def test_an_empty_directory_is_taken(user: UserDirectory) -> None:
    (user.root / "out").mkdir()
    assert shard(user).status == 0
    assert len(list((user.root / "out").iterdir())) == 2


def test_a_mistake_or_a_full_disk_leaves_nothing(user: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = shard(user, "--tensor-parallelism-size", "3")
    assert refused.status == 2
    assert "tensor_parallel_size=3 does not divide the 8 attention heads" in refused.err

    def full(*_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_shards, "link_or_copy", full)
    ran = shard(user)
    assert ran.status == 3
    assert "step shard failed: OSError: [Errno 28] No space left on device" in ran.err
    assert [path.name for path in user.root.iterdir() if "out" in path.name] == []


def test_without_a_directory_there_is_no_such_task(user: UserDirectory) -> None:
    build = user.open()
    names = [task["basename"] for task in graph.doit_tasks(build, EventReporter(build))]
    assert "shard" not in names


def test_metadata_says_how_a_checkpoint_is_quantized_that_was_taken(user: UserDirectory, tmp_path: Path) -> None:
    checkpoint = save_quantized(user.root / "tiny", tmp_path / "quantized", "fp8-tensor")
    assert shard(user, f"quantization.quantize_artifact_path={checkpoint}").status == 0
    metadata = read_metadata(user.root / "out")
    assert metadata["model"]["quantization"] == "fp8-tensor"
    assert metadata["parameters"]["model.layers.0.mlp.up_proj.weight"]["quantization"] == "fp8-tensor"
