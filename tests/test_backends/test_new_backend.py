"""A backend of another package, all of it in this file: targets, a layout of parameters, one file for many programs, a
library that they call.

Nothing else of the project names it. `build`, `qualify` and the runtime find it by its entry point.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import pytest
import torch
from safetensors.torch import load_file

from furiosa_build.backends.base import Backend, Costs, LoadedProgram, Option, Packer, ProgramLocation
from furiosa_build.backends.graph import Graph
from furiosa_build.backends.graph_interpreter import GraphInterpreter
from furiosa_build.backends.target import Target, unknown_target
from furiosa_build.backends.torch_device import TorchDevice
from furiosa_build.core.errors import UserError
from furiosa_build.ir.tensors import Layout, TensorSpec

pytestmark = pytest.mark.grid  # one build takes ten seconds, and what it goes through has tests of its own

if TYPE_CHECKING:
    from ..conftest import StartBuild

HERE = "toy-1"
"""What this machine is."""
RULES = "the rules of toys"
"""What the library is made of."""


class TransposedPacker(Packer):
    """Matrices are stored by columns."""

    def layout(self, scheme: str, part: str, layout: Layout) -> Layout:
        del scheme, part
        return Layout(layout.dtype, layout.shape[::-1])

    def pack(self, scheme: str, part: str, tensor: torch.Tensor) -> torch.Tensor:
        del scheme, part
        return tensor.T.contiguous() if tensor.ndim == 2 else tensor


class ToyDevice(TorchDevice):
    def parameter(self, stored: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
        return super().parameter(stored.T.contiguous() if stored.ndim == 2 else stored, spec)


class ToyProgram:
    def __init__(self, graph: Graph) -> None:
        self._graph = GraphInterpreter(graph)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(self._graph(*inputs))


class ToyBackend(Backend):
    name = "toy"
    file_suffix = ".toy"
    costs = Costs(worker=333_000_000, program=1234, library=17, library_worker=222_000_000)
    library = "rules.txt"
    targets: ClassVar[Sequence[str]] = ("toy-1", "toy-2")

    def isa(self, requested: str) -> str:
        if requested not in ("native", *self.targets):
            raise unknown_target(self.name, requested, self.targets)
        return HERE if requested == "native" else requested

    def check_host(self, target: Target, where: str) -> None:
        if target.isa != HERE:
            raise UserError(f"the artifact is for a {target.isa}, this is a {HERE}", where=where)

    def key_factors(self) -> Mapping[str, str]:
        return {"toy": "1.0"}

    def library_factors(self) -> Mapping[str, str]:
        return {"rules": RULES}

    def build_library(self, output: Path, scratch: Path) -> None:
        del scratch
        output.write_text(RULES)

    def packer(self, isa: str) -> Packer:
        del isa
        return TransposedPacker()

    def locate(self, number: int) -> ProgramLocation:
        return ProgramLocation("module.toy", f"graph-{number}")

    def compile_all(
        self,
        graphs: Sequence[Graph],
        directory: Path,
        isa: str,
        scratch: Path,
        options: Mapping[str, Option] | None = None,
        core_aten: bool = False,
    ) -> None:
        del scratch, options, core_aten
        entries = {self.locate(n).entry: graph.data.model_dump(mode="json") for n, graph in enumerate(graphs)}
        (directory / "module.toy").write_text(json.dumps({"isa": isa, "entries": entries}))

    def compile(
        self,
        graph: Graph,
        output: Path,
        isa: str,
        scratch: Path,
        options: Mapping[str, Option] | None = None,
        core_aten: bool = False,
    ) -> None:
        raise NotImplementedError("several graphs are compiled at a time")

    def load(
        self, program: Path, concurrency: int = 1, entry: str | None = None, library: Path | None = None
    ) -> LoadedProgram:
        del concurrency
        if library is None or library.read_text() != RULES:
            raise ValueError("these are not the rules")
        found = json.loads(program.read_text())["entries"].get(entry)
        if found is None:
            raise ValueError(f"there is no {entry!r}")
        return ToyProgram(Graph.from_json(json.dumps(found).encode()))

    def device(self) -> ToyDevice:
        return ToyDevice()


MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
SETTINGS = {
    "scheme": "int8",
    "parallel": {"tensor_parallel_size": 2},
    "prefill_buckets": [[1, 32]],
    "decode_buckets": [[1, 64]],
    "max_seq_len_to_capture": 64,
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The backend is installed, for this process and those that it starts."""
    site = tmp_path_factory.mktemp("site")
    about = site / "toy_backend-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-backend\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[furiosa_build.backends]\ntoy = {__name__}:ToyBackend\n")
    paths = [str(site), str(Path(__file__).parents[1])]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]))
        yield


@pytest.fixture(scope="module")
def built(installed: None, start_build: StartBuild) -> tuple[Path, list[str]]:
    """The artifact, after one for backend eager; and the steps that ran for it."""
    del installed
    of_eager = start_build(MODEL, backend="eager", **SETTINGS)
    for step in of_eager.plan.steps:
        of_eager.run(step)
    build = start_build(MODEL, backend="toy", **SETTINGS)
    ran = [step for step in build.plan.steps if build.run(step).ran]
    return build.version_directory, ran


def test_it_qualifies_and_only_what_it_shapes_is_made_again(built: tuple[Path, list[str]]) -> None:
    _, ran = built
    assert "qualify" in ran
    kinds = {step.partition(":")[0] if step != "partition:weights" else step for step in ran}
    assert kinds == {"partition:weights", "kernels", "compile", "package", "qualify"}


def test_programs_share_the_file_of_a_compile_step(built: tuple[Path, list[str]]) -> None:
    from furiosa_build.artifact.reader import open_artifact

    artifact = open_artifact(built[0], verify="full").artifact
    programs = artifact.programs
    by_file: dict[str, list[str]] = {}
    for program in programs.values():
        by_file.setdefault(program.file, []).append(cast(str, program.entry))
    assert {Path(file).suffix for file in by_file} == {".toy"}
    assert ["graph-0", "graph-1", "graph-2"] in [sorted(entries) for entries in by_file.values()]
    there = {path.relative_to(built[0]).as_posix() for path in (built[0] / "programs").iterdir()}
    assert there == {*by_file, artifact.library}


def test_the_library_is_in_the_artifact(built: tuple[Path, list[str]], start_build: StartBuild) -> None:
    from furiosa_build.artifact.schema import Artifact
    from furiosa_build.ui.artifact_text import artifact_text

    def described(directory: Path) -> dict[str, object]:
        return cast(dict[str, object], json.loads((directory / "artifact.json").read_bytes()))

    assert described(built[0])["library"] == "programs/rules.txt"
    assert (built[0] / "programs/rules.txt").read_text() == RULES
    text = artifact_text(Artifact.model_validate(described(built[0])), built[0])
    assert re.search(r"rules.txt +library +17 B +called by all of them", text)
    assert "library" not in described(start_build(MODEL, backend="eager", **SETTINGS).version_directory)


def test_programs_do_not_depend_on_the_library(
    built: tuple[Path, list[str]], start_build: StartBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    del built
    monkeypatch.setattr(f"{__name__}.RULES", "other rules")
    found = {one.step: one for one in start_build(MODEL, backend="toy", **SETTINGS).explain()}
    undone = {name: one.state for name, one in found.items() if one.state != "up to date"}
    assert undone.keys() == {"kernels", "package", "qualify"}
    assert [change.place for change in found["kernels"].changes] == [("tools", "rules")]


def test_parameters_are_packed(built: tuple[Path, list[str]]) -> None:
    [file] = (built[0] / "params").glob("stage-0-rank-1-*.safetensors")
    stored = load_file(file)
    assert stored["model.layers.0.mlp.down_proj.weight_packed"].shape == (96 // 2 // 4, 64)
    assert stored["model.layers.0.mlp.down_proj.weight_scale"].shape == (1, 64)
    assert stored["model.norm.weight"].shape == (64,)


def test_it_generates_what_the_eager_backend_generates(built: tuple[Path, list[str]], start_build: StartBuild) -> None:
    from furiosa_build.runtime import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    directories = [built[0], start_build(MODEL, backend="eager", **SETTINGS).version_directory]
    found, expected = (LLM(directory).generate([[3, 1, 4], [1, 5]], params) for directory in directories)
    assert [one.outputs[0].token_ids for one in found] == [one.outputs[0].token_ids for one in expected]


def test_its_target_is_in_the_artifact_and_checked_by_it(
    built: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from furiosa_build.artifact.reader import open_artifact

    assert open_artifact(built[0]).artifact.target.isa == "toy-1"
    monkeypatch.setattr(f"{__name__}.HERE", "toy-2")
    with pytest.raises(UserError, match="the artifact is for a toy-1, this is a toy-2"):
        open_artifact(built[0])


def test_a_target_of_another_backend_is_refused() -> None:
    with pytest.raises(UserError, match="backend toy makes no programs for instruction set 'x86-64-v3'") as error:
        ToyBackend().isa("x86-64-v3")
    assert error.value.valid == "toy-1, toy-2"


def test_its_costs_are_those_of_the_plan(installed: None, start_build: StartBuild) -> None:
    del installed
    figures = start_build(MODEL, backend="toy", **{**SETTINGS, "decode_buckets": [[2, 64]]}).preflight()
    assert figures.compile_worker == ToyBackend.costs.worker
    assert {work.written for name, work in figures.work.items() if name.startswith("compile:decode-2x64")} == {3 * 1234}
    assert figures.programs == sum(name.startswith("compile:") for name in figures.work)


def test_what_the_library_costs_is_planned(
    installed: None, start_build: StartBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    del installed
    monkeypatch.setattr(f"{__name__}.RULES", "rules that nobody has seen")
    figures = start_build(MODEL, backend="toy", **SETTINGS).preflight()
    assert figures.work["kernels"].written == 17
