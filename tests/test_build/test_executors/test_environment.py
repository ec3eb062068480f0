"""What reaches workers of the environment that a build runs in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from furiosa_build.build.executors.environment import clean_environment
from furiosa_build.build.executors.local import WorkerPool
from furiosa_build.steps.base import Inputs, Job, Request

KEPT = {
    "PATH": "/bin",
    "HOME": "/home/user",
    "TMPDIR": "/tmp",
    "PYTHONPATH": "/project",
    "LC_ALL": "C",
    "HF_HOME": "/hub",
    "OMP_NUM_THREADS": "2",
    "CXX": "ccache g++",
    "FURIOSA_BUILD_FAULT": "",
}
SHAPING = [
    *("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "CFLAGS", "CXXFLAGS", "LDFLAGS"),
    *("TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG", "TORCH_LOGS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"),
    *("PYTHONHASHSEED", "PYTHONOPTIMIZE", "SOURCE_DATE_EPOCH", "GCC_EXEC_PREFIX"),
]


@pytest.fixture
def _restored() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("_restored")
def test_what_is_listed_is_kept_and_all_else_is_cleared() -> None:
    os.environ.clear()
    os.environ.update({**KEPT, **dict.fromkeys(SHAPING, "1"), "UNHEARD_OF": "1"})
    clean_environment()
    assert dict(os.environ) == KEPT


class TellEnvironment(Job[Request]):
    """Writes the environment, and the default of a setting that torch takes from it."""

    name = "tell"
    Request = Request

    def run(self, request: Request, inputs: Inputs, output: Path) -> None:
        del request, inputs
        import torch._inductor.config

        unsafe = torch._inductor.config.cpp.enable_unsafe_math_opt_flag
        (output / "told.json").write_text(json.dumps({"environment": dict(os.environ), "unsafe": unsafe}))


@pytest.mark.grid
def test_a_worker_sees_no_setting_of_the_users_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in SHAPING:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONPATH", "/project")
    with closing(WorkerPool(1, lambda _: Inputs({}, tmp_path))) as pool:
        pool.run("tell", TellEnvironment(), Request(), tmp_path, tmp_path / "log")
    told = json.loads((tmp_path / "told.json").read_text())
    assert not told["environment"].keys() & set(SHAPING)
    assert told["environment"]["PYTHONPATH"] == "/project"
    assert told["unsafe"] is False
    assert os.environ["PYTHONHASHSEED"] == "1", "the build's own environment is as it was"


class TellHashes(Job[Request]):
    """Writes the hashes of some names."""

    name = "hashes"
    Request = Request

    def run(self, request: Request, inputs: Inputs, output: Path) -> None:
        del request, inputs
        (output / "told.json").write_text(json.dumps([hash(name) for name in KEPT]))


def test_strings_have_the_same_hashes_in_every_worker(tmp_path: Path) -> None:
    """So a set of names has the same order, and graphs that are made by walking over one are the same."""
    told = []
    for _ in range(2):
        with closing(WorkerPool(1, lambda _: Inputs({}, tmp_path))) as pool:
            pool.run("hashes", TellHashes(), Request(), tmp_path, tmp_path / "log")
        told.append((tmp_path / "told.json").read_text())
    assert told[0] == told[1]
