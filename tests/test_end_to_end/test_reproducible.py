"""The artifact is a function of its inputs: everything around two builds differs, and no byte of the artifact does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from user_directory import make_model, make_user_directory

from furiosa_build.artifact.schema import TIMESTAMP_FILE
from furiosa_build.build.reproduce import differing_files

SURROUNDINGS = [
    {"TZ": "UTC", "LANG": "C", "LC_ALL": "C", "PYTHONHASHSEED": "0"},
    {
        **{"TZ": "Pacific/Auckland", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "4711", "COLUMNS": "40"},
        # These would shape programs; the second finds no header of the C library's.
        **{"TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG": "1", "CPATH": "{root}/include"},
    },
]
WORKERS = [1, 2]


@pytest.mark.grid
def test_two_builds_with_inductor_in_other_surroundings_give_the_same_bytes(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model" / "tiny")
    artifacts = []
    for place, surroundings, workers in zip(("here", "there is one more"), SURROUNDINGS, WORKERS, strict=True):
        root = tmp_path / place
        user = make_user_directory(root / "user", root / "store", model)
        for directory in ("home", "tmp", "include"):
            (root / directory).mkdir()
        (root / "include" / "math.h").write_text("#error the header of the user's environment\n")
        subprocess.run(
            [
                Path(sys.executable).with_name("furiosa-build"),
                *("build", "tiny", "backend=inductor", f"num_compile_workers={workers}"),
                # A program a bucket has all that the usual ones have, and two take a third of the time of six.
                *(f"num_pipeline_builder_workers={workers}", "rewriting.use_blockwise_compile=false"),
            ],
            cwd=user.root,
            env={
                **os.environ,
                **{name: value.format(root=root) for name, value in surroundings.items()},
                "HOME": str(root / "home"),
                "TMPDIR": str(root / "tmp"),
                "FURIOSA_BUILD_CACHE": str(user.store),
            },
            check=True,
            capture_output=True,
        )
        artifacts.append((user.artifacts / "latest").resolve())
    here, there = artifacts
    assert here.name == there.name
    assert differing_files(here, there) == []
    names = {path.relative_to(root).as_posix() for root in artifacts for path in root.rglob("*") if path.is_file()}
    different = {name for name in names if (here / name).read_bytes() != (there / name).read_bytes()}
    assert different <= {TIMESTAMP_FILE}
    assert sum(name.endswith(".so") for name in names) == 2, "programs were compared"
