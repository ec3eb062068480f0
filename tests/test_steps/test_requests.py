"""The request of a step can be carried out elsewhere: it is plain data without a path, and its inputs are digests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from user_directory import CONFIG, UserDirectory, make_new_directory, run, steps_in_this_process

from furiosa_build.build.executors.in_process import run_here
from furiosa_build.core.file_digests import hash_file
from furiosa_build.steps.base import Inputs

OVERRIDES = ("quantization=int8", "parallel.tensor_parallel_size=2")
DRAFT = f"""\
defaults: [tiny]
model: {{model_id_or_path: test/small, architecture: {CONFIG}, seed_for_random_weight: 3}}
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UserDirectory]:
    """A directory in which the model has been built, with a draft."""
    user = make_new_directory(tmp_path_factory.mktemp("requests"))
    (user.root / "recipes" / "small.yaml").write_text(DRAFT.replace("None", "null").replace("False", "false"))
    with steps_in_this_process():
        with closing(user.open(*OVERRIDES, *WITH_DRAFT)) as build:
            run(build)
        yield user


WITH_DRAFT = ("speculative.recipe=small", "buckets.append_buckets=null")


@pytest.mark.grid
def test_every_step_does_the_same_from_its_request_as_text(user: UserDirectory, tmp_path: Path) -> None:
    """With no more than the files that the request names, which lie elsewhere by their digests."""
    with closing(user.open(*OVERRIDES, *WITH_DRAFT)) as build:
        assert {step.action for step in build.plan.steps.values() if step.model_id} >= {"fetch", "trace", "compile"}
        for name, step in build.plan.steps.items():
            made = {path: output.sha256 for path, output in build.run(name).record.outputs.items()}
            request = step.type.request(step, build.files)
            text = request.model_dump_json()
            assert str(user.root.parent) not in text, "no path of this machine"
            elsewhere, output = tmp_path / "blobs", tmp_path / "output"
            for directory in (elsewhere, output):
                directory.mkdir()
            for path in build.files.inputs(request).files.values():
                shutil.copyfile(path, elsewhere / hash_file(path))
            received = type(request).model_validate_json(text)
            inputs = {input: elsewhere / sha256 for input, sha256 in received.inputs.items()}
            run_here(step.type, received, Inputs(inputs, tmp_path / "scratch"), output)
            files = [path for path in output.rglob("*") if path.is_file()]
            assert {path.relative_to(output).as_posix(): hash_file(path) for path in files} == made, name
            for directory in (elsewhere, output):
                shutil.rmtree(directory)
