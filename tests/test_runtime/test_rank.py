from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from furiosa_build.artifact.reader import open_artifact
from furiosa_build.artifact.schema import Pipeline
from furiosa_build.backends.torch_device import TorchDevice
from furiosa_build.core.errors import UserError
from furiosa_build.runtime.execution.communicator import local_communicators
from furiosa_build.runtime.execution.input_buffers import InputBuffers, Row
from furiosa_build.runtime.execution.rank import RankRunner, load_programs

from . import toy


def slots(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def buffers(phase: str, batch: int, query: int, context: int, names: Sequence[str]) -> InputBuffers:
    task = {**toy._task("p", {name: name for name in names}, ["logits"])}
    fields = {
        "name": "b",
        "phase": phase,
        "batch_size": batch,
        "query_length": query,
        "context_length": context,
        "supertasks": [task],
    }
    return InputBuffers(Pipeline.model_validate(fields), TorchDevice())


ALL_INPUTS = ["input_ids", "position_ids", "slot_mapping", "context_slots", "context_lens", "logits_indices"]


def test_prefill_inputs() -> None:
    made = buffers("prefill", 3, 4, 4, ALL_INPUTS)
    rows = [Row([7, 8], 0, slots(5, 6, 7)), Row([9, 9, 9, 9], 0, slots(1, 2, 3, 4))]
    made.fill([Row([1, 2, 3], 0, slots(9, 9, 9))] * 3)  # nothing of an earlier step is left over
    made.fill(rows)
    assert {name: tensor.tolist() for name, tensor in made.tensors.items()} == {
        "input_ids": [[7, 8, 0, 0], [9, 9, 9, 9], [0, 0, 0, 0]],
        "position_ids": [[0, 1, 0, 0], [0, 1, 2, 3], [0, 0, 0, 0]],
        "slot_mapping": [[5, 6, 0, 0], [1, 2, 3, 4], [0, 0, 0, 0]],
        "context_slots": [[5, 6, 5, 5], [1, 2, 3, 4], [0, 0, 0, 0]],
        "context_lens": [2, 4, 1],
        "logits_indices": [1, 3, 0],
    }
    assert all(tensor.dtype == torch.int64 for tensor in made.tensors.values())


def test_decode_inputs() -> None:
    made = buffers("decode", 2, 1, 5, ALL_INPUTS)
    made.fill([Row([7], 2, slots(5, 6, 9, 10))])
    assert {name: tensor.tolist() for name, tensor in made.tensors.items()} == {
        "input_ids": [[7], [0]],
        "position_ids": [[2], [0]],
        "slot_mapping": [[9], [0]],
        "context_slots": [[5, 6, 9, 5, 5], [0, 0, 0, 0, 0]],
        "context_lens": [3, 1],
        "logits_indices": [0, 0],
    }


def test_only_inputs_that_are_read_are_fed() -> None:
    assert set(buffers("decode", 1, 1, 4, ["input_ids", "context_lens"]).tensors) == {"input_ids", "context_lens"}


def runner(path: Path, num_slots: int = 64) -> RankRunner:
    opened = open_artifact(path)
    [end] = local_communicators(1, 1)
    return RankRunner(opened, num_slots, load_programs(opened), end)


def run(made: RankRunner, pipeline: str, rows: list[Row]) -> torch.Tensor:
    outputs = made.run(pipeline, rows)
    assert outputs is not None
    return torch.from_numpy(outputs.logits)


@pytest.mark.parametrize("last_only", [False, True])
def test_a_pipeline_runs(toy_backend: toy.ToyBackend, tmp_path: Path, last_only: bool) -> None:
    path = toy.write_artifact(tmp_path / "a", toy.artifact_data(last_only=last_only))
    made = runner(path)
    a, b = [5, 6, 7], [1, 2, 3, 4, 5]
    prefill = run(made, "prefill-4x8", [Row(a, 0, slots(9, 4, 6, 20)), Row(b, 0, slots(30, 31, 32, 33, 34, 35))])
    assert prefill.shape == (4, 1 if last_only else 8, toy.VOCAB)
    for row, tokens in enumerate((a, b)):
        last = 0 if last_only else len(tokens) - 1
        torch.testing.assert_close(prefill[row, last], toy.logits_after(tokens))
    decode = run(made, "decode-4x24", [Row([8], 5, slots(30, 31, 32, 33, 34, 35)), Row([9], 3, slots(9, 4, 6, 20))])
    torch.testing.assert_close(decode[0, 0], toy.logits_after([*b, 8]))
    torch.testing.assert_close(decode[1, 0], toy.logits_after([*a, 9]))
    # Each file is loaded once, however many programs and supertasks share it.
    assert len(toy_backend.loaded) == len(set(toy_backend.loaded)) == 4


def test_padding_writes_to_slot_0_only(toy_artifact: Path) -> None:
    made = runner(toy_artifact)
    run(made, "prefill-4x8", [Row([5, 6], 0, slots(9, 4))])
    run(made, "decode-4x24", [Row([5], 2, slots(9, 4, 7))])
    for cache in made._kv_caches.values():
        assert set(cache.nonzero().flatten().tolist()) <= {0, 4, 7, 9}


def test_parameters_are_mapped_not_copied(toy_artifact: Path) -> None:
    made = runner(toy_artifact)
    file = str(toy_artifact / "params" / "toy.safetensors")
    mappings = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(file):
            begin, end = line.split()[0].split("-")
            mappings.append(range(int(begin, 16), int(end, 16)))
            assert line.split()[1].endswith("p")  # private: writing cannot reach the file
    tensors = list(made.parameters.values())
    assert len(tensors) == 3
    for tensor in tensors:
        assert any(tensor.data_ptr() in mapping for mapping in mappings)
    bound = made._pipelines["decode-1x24"].tasks[-1].chain._links[-1][0].inputs[-1]
    assert bound.data_ptr() == made.parameters["table"].data_ptr()


def test_kv_caches_start_as_zeros(toy_artifact: Path) -> None:
    caches = runner(toy_artifact, num_slots=12)._kv_caches
    assert sorted(caches) == [(0, "key_cache"), (0, "value_cache"), (1, "key_cache"), (1, "value_cache")]
    assert all(cache.tolist() == [0] * 12 for cache in caches.values())


def test_supertasks_are_one_chain(toy_artifact: Path) -> None:
    [chain] = runner(toy_artifact)._pipelines["decode-1x24"].tasks
    fed = ["context_lens", "context_slots", "input_ids", "position_ids", "slot_mapping"]
    assert chain.reads == chain.last_used == fed


@pytest.mark.parametrize("stored", [torch.uint8, torch.int64, torch.float32])
def test_a_parameter_of_another_dtype_is_reinterpreted(
    toy_backend: toy.ToyBackend, tmp_path: Path, stored: torch.dtype
) -> None:
    del toy_backend
    parameters = toy.default_parameters() | {"table": toy.table().view(stored)}
    made = runner(toy.write_artifact(tmp_path / "a", parameters=parameters))
    logits = run(made, "prefill-1x8", [Row([1], 0, slots(1))])
    torch.testing.assert_close(logits[0, 0], toy.logits_after([1]))


def parameter(name: str, tensor: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = toy.default_parameters()
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    return tensors


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (parameter("layers.1.coefficient", None), "has 'layers.1.coefficient'"),
        (parameter("table", torch.zeros(3)), r"'table' is stored as float32 \[3\]: it is not a float32"),
        (parameter("table", torch.zeros(3, dtype=torch.uint8)), r"stored as uint8 \[3\]: it is not a float32"),
        (parameter("table", torch.zeros(toy.P, 3, dtype=torch.int64)), "it is not a float32"),
    ],
)
def test_parameters_that_do_not_fit(
    toy_backend: toy.ToyBackend, tmp_path: Path, parameters: dict[str, torch.Tensor], message: str
) -> None:
    del toy_backend
    with pytest.raises(UserError, match=message):
        runner(toy.write_artifact(tmp_path / "a", parameters=parameters))


def supertask(change: Callable[[Any], object]) -> Callable[[Any], object]:
    """Changes the first layer's supertask of the first pipeline."""
    return lambda data: change(data["pipelines"][0]["supertasks"][1])


def program(change: Callable[[Any], object]) -> Callable[[Any], object]:
    """Changes the program of that supertask."""
    return lambda data: change(data["programs"]["block-prefill-1x8"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (supertask(lambda task: task.update(kind="comm")), "joins one tensor into one"),
        (supertask(lambda task: task.update(ranks=[0, 1])), r"for ranks \[0, 1\], not for all"),
        (supertask(lambda task: task["inputs"].update(hidden="nowhere")), "nothing gives tensor 'nowhere'"),
        (supertask(lambda task: task["inputs"].update(hidden="hidden.2")), "nothing gives tensor 'hidden.2'"),
        (supertask(lambda task: task["inputs"].pop("hidden")), "nothing gives tensor ''"),
        (supertask(lambda task: task.update(layers=[])), r"'coefficient' is of block 0, of layers \[\]"),
        (supertask(lambda task: task.update(layers=[7])), "'layers.7.coefficient'"),
        (program(lambda program: program["inputs"][-1].update(block=None)), "'value_cache' is of block None"),
        (program(lambda program: program["inputs"][-1].update(block=1)), "'value_cache' is of block 1"),
        (supertask(lambda task: task.update(outputs=["a", "b"])), "has 1 outputs"),
        (supertask(lambda task: task.update(stage=1)), "there is no stage 1"),
        (program(lambda program: program["inputs"][-1].update(name="cache")), "no KV storage 'cache'"),
        (program(lambda program: program["inputs"][-1].update(shape=[None, 2])), "'value_cache' is int64"),
        (program(lambda program: program["inputs"][-1].update(dtype="int32")), "'value_cache' is int32"),
        (program(lambda program: program["inputs"][3].update(dtype="int333")), "no dtype 'int333'"),
        (lambda data: data["kv_cache"][0].update(dtype="zeros"), "no dtype 'zeros'"),
        (lambda data: data["kv_cache"][0].update(shape_per_slot=[2**50]), "no memory for KV caches of 64 tokens"),
        (lambda data: data["pipelines"][0]["supertasks"].pop(), "does not give `logits`"),
        (lambda data: data["pipelines"][0]["supertasks"].clear(), "does not give `logits`"),
    ],
)
def test_artifacts_that_do_not_fit_together(
    toy_backend: toy.ToyBackend, tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    del toy_backend
    data = toy.artifact_data()
    change(data)
    with pytest.raises(UserError, match=message):
        runner(toy.write_artifact(tmp_path / "a", data))


@pytest.mark.parametrize("error", [RuntimeError("bad library"), ValueError("bad graph"), OSError("bad file")])
def test_a_program_that_does_not_load(
    toy_artifact: Path, toy_backend: toy.ToyBackend, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(toy_backend, "load", fail)
    with pytest.raises(UserError, match=f"cannot load program .*{error}"):
        runner(toy_artifact)
