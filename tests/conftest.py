"""What the tests share: artifacts of small models, built in this process and kept for the session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from compiled_kernels import link_kernels

from furiosa_build.backends.native.backend import NativeBackend
from furiosa_build.build.build import Build
from furiosa_build.build.executors.in_process import InProcess
from furiosa_build.recipe.schema import (
    BackendSpec,
    BucketSpec,
    BuildOptions,
    BuildSpec,
    ModelSpec,
    ParallelSpec,
    QuantizationSpec,
    Recipe,
    TargetSpec,
)

# Before torch is imported. On tensors as small as these, threads cost more time than they save; where other work shares
# the cores they cost ten times as much.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# There is no network for tests; the hub's library would try for half a minute.
os.environ["HF_HUB_OFFLINE"] = "1"

# No deadline for one example: how long it takes depends on what else the machine is doing.
hypothesis.settings.register_profile("furiosa_build", deadline=None)
hypothesis.settings.load_profile("furiosa_build")

StartBuild = Callable[..., Build]
BuildArtifact = Callable[..., Path]
OutputsOf = Callable[[Build, str], Path]

BUCKETS = {
    "prefill_buckets": [[1, 32], [2, 64]],
    "append_buckets": [],
    "decode_buckets": [[1, 64], [4, 128]],
    "max_seq_len_to_capture": 128,
    "paged_attention_block_size": 16,
}
"""Two of each phase, of different batch sizes and lengths, so that padding and the choice of bucket are at work."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default="eager", help="of the artifacts that tests build where they name none")


@pytest.fixture(scope="session", autouse=True)
def kernels_are_compiled_once() -> Iterator[None]:
    """Builds in the tests' own process do not compile the kernels anew, each in its store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeBackend, "build_library", lambda _, output, __: link_kernels(output))
        yield


@pytest.fixture(scope="session")
def start_build(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> StartBuild:
    """Begins a build: `start_build(model, scheme="fp8", paged_attention_block_size=1, ...)`. No step has run.

    `model` is the fields of a config.json (weights are drawn from `seed`), or a directory in Hugging Face layout.
    Further keywords: `scheme`, `rules` and `checkpoint` (a directory that is quantized already), `backend`, `parallel`,
    those of ModelSpec, of QuantizationSpec and of BucketSpec.
    """
    root = tmp_path_factory.mktemp("builds")

    def start(
        model: Mapping[str, Any] | Path,
        *,
        seed: int | None = None,
        scheme: str = "none",
        rules: tuple[Mapping[str, str], ...] = (),
        checkpoint: Path | None = None,
        backend: str | None = None,
        parallel: Mapping[str, int] | None = None,
        **others: Any,
    ) -> Build:
        of_model = {key: others.pop(key) for key in list(others) if key in ModelSpec.model_fields}
        if isinstance(model, Path):
            of_model["model_id_or_path"] = str(model)
        else:
            of_model.update(model_id_or_path="test/random", architecture=dict(model))
            seed = seed or 0
        choices = {key: others.pop(key) for key in list(others) if key in QuantizationSpec.model_fields}
        spec = BuildSpec(
            name="test",
            model=ModelSpec(seed_for_random_weight=seed, **of_model),
            target=TargetSpec(name="cpu"),
            backend=BackendSpec(name=backend or pytestconfig.getoption("backend")),
            buckets=BucketSpec.model_validate({**BUCKETS, **others}),
            quantization=QuantizationSpec.model_validate(
                {
                    "scheme": scheme,
                    "rules": rules,
                    **choices,
                    "quantize_artifact_path": None if checkpoint is None else str(checkpoint),
                }
            ),
            parallel=ParallelSpec.model_validate(parallel or {}),
        )
        options = BuildOptions(save_dir=str(root / "artifacts"), cache_dir=str(root / "store"))
        build = Build(Recipe(spec=spec, options=options, roots=(root,)))
        # In this process, which has imported torch already; what a step raises comes out as it is.
        here = InProcess(build.files.inputs)
        build.executors.update(builder=here, compiler=here)
        return build

    return start


@pytest.fixture(scope="session")
def build_artifact(start_build: StartBuild) -> BuildArtifact:
    """Builds an artifact, without qualifying it; takes what `start_build` takes and returns the artifact's directory.

    All builds of a session share a store, so asking for the same artifact again costs next to nothing.
    """

    def build(model: Mapping[str, Any] | Path, **others: Any) -> Path:
        started = start_build(model, **others)
        for step in started.plan.steps:
            if step != "qualify":
                started.run(step)
        return started.version_directory

    return build


@pytest.fixture
def outputs_of(tmp_path: Path) -> OutputsOf:
    """The outputs of a step as a directory: `outputs_of(build, "quantize")`. Runs the steps that lead there."""

    def outputs(build: Build, step: str) -> Path:
        directory = tmp_path / step.replace(":", "-")
        directory.mkdir()
        for name in build.plan.steps:
            done = build.run(name)
            if name == step:
                for path, output in done.record.outputs.items():
                    os.link(build.store.path(output), directory / path)
                break
        return directory

    return outputs
