"""A user's directory outside of the repository: a tiny model, a recipe of it, a store. Steps run in this process."""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_models.tiny import LLAMA, save_random_model

from furiosa_build.artifact.reader import open_artifact
from furiosa_build.artifact.schema import Artifact
from furiosa_build.build.build import Build, open_build
from furiosa_build.build.executors.in_process import run_here
from furiosa_build.build.executors.local import WorkerPool
from furiosa_build.cli import furiosa_llm as llm
from furiosa_build.cli import main
from furiosa_build.core.errors import BuildError, StepError
from furiosa_build.runtime.probe import Questions, probe
from furiosa_build.steps import qualify
from furiosa_build.steps.base import Job, Request
from furiosa_build.steps.qualification.process import judge
from furiosa_build.store import ActionResult

CONFIG: dict[str, Any] = {**LLAMA, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}

RECIPE = """\
# A tiny model of a user.
defaults:
  - base
  - buckets: small
  - quantization: none
  - override backend: eager
model:
  model_id_or_path: tiny
buckets:
  prefill_buckets: [[1, 32]]
  append_buckets: []
  decode_buckets: [[2, 64]]
  max_seq_len_to_capture: 64
"""

RANDOM = ("model.seed_for_random_weight=0",)


@dataclass(frozen=True)
class UserDirectory:
    """`root` is the current directory; the recipe `tiny` builds the model in `root/tiny`."""

    root: Path
    store: Path

    @property
    def artifacts(self) -> Path:
        """Where the recipe's artifacts go."""
        return self.root / "artifacts" / "tiny"

    def open(self, *overrides: str, recipe: str = "tiny") -> Build:
        """The build, as a new process would open it."""
        return open_build(recipe, [f"cache_dir='{self.store}'", *overrides], self.root)

    def build(self, *overrides: str, recipe: str = "tiny") -> list[str]:
        """Builds; returns the steps that did work."""
        return run(self.open(*overrides, recipe=recipe))

    def package(self, *overrides: str) -> Path:
        """Builds but does not qualify: for tests that compare more than that does. Returns the artifact's directory."""
        build = self.open(*overrides)
        for name in build.plan.steps:
            if name != "qualify" and not build.is_done(name):
                build.run(name)
        return build.version_directory

    def latest(self) -> Artifact:
        """The latest artifact, every byte of it verified."""
        return open_artifact(self.artifacts / "latest", verify="full").artifact


def make_user_directory(root: Path, store: Path, model: Path) -> UserDirectory:
    """A new directory with the recipe and a copy of `model`."""
    (root / "recipes").mkdir(parents=True)
    (root / "recipes" / "tiny.yaml").write_text(RECIPE)
    shutil.copytree(model, root / "tiny")
    return UserDirectory(root, store)


def make_new_directory(root: Path) -> UserDirectory:
    """A new directory with the tiny model; nothing has been built."""
    return make_user_directory(root / "user", root / "store", make_model(root / "model" / "tiny"))


def make_built_directory(root: Path) -> UserDirectory:
    """A new directory in which the recipe has been built."""
    user = make_new_directory(root)
    with steps_in_this_process():
        user.build()
    return user


def make_model(directory: Path) -> Path:
    """The tiny model, with random weights."""
    return save_random_model(CONFIG, directory)


class Ran(NamedTuple):
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


def furiosa_build(user: UserDirectory, *arguments: str, **environment: str) -> Ran:
    """Calls the console script in a user's directory: `furiosa_build(user, "plan", "tiny")`."""
    return _call("furiosa-build", main.main, user, arguments, environment)


def furiosa_llm(user: UserDirectory, *arguments: str) -> Ran:
    """Calls the other console script."""
    return _call("furiosa-llm", llm.main, user, arguments, {})


def _call(
    program: str,
    script: Callable[[], None],
    user: UserDirectory,
    arguments: Sequence[str],
    environment: Mapping[str, str],
) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(user.root)
        for name, value in {"FURIOSA_BUILD_CACHE": str(user.store), **environment}.items():
            patch.setenv(name, value)
        patch.setattr("sys.argv", [program, *arguments])
        with pytest.raises(SystemExit) as ended:
            script()
    status = ended.value.code or 0
    assert isinstance(status, int)
    return Ran(status, out.getvalue(), err.getvalue())


def run(build: Build) -> list[str]:
    """Runs every step that is not done, as doit does; returns those that did work."""
    return [name for name in build.plan.steps if not build.is_done(name) and build.run(name).ran]


@contextmanager
def steps_in_this_process() -> Iterator[pytest.MonkeyPatch]:
    """No worker processes, and no fresh process to qualify: importing torch once is enough."""
    one_at_a_time = threading.Lock()  # As in a worker: torch traces in one thread.

    def run_in_this_process(
        self: WorkerPool, name: str, job: Job[Any], request: Request, output: Path, log: Path
    ) -> ActionResult:
        inputs = self._find(request)
        try:
            with one_at_a_time:
                return run_here(job, request, inputs, output)
        except BuildError:
            raise
        except Exception as error:
            raise StepError(name, f"{type(error).__name__}: {error}", str(log)) from error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkerPool, "run", run_in_this_process)
        patch.setattr(qualify, "judged", judged_in_this_process)
        yield patch


def judged_in_this_process(case: qualify.Case) -> qualify.Verdict:
    """What `qualify.judged` does in a process of its own, and the artifact in another."""
    return judge(case, lambda questions: answer_in_this_process(case.artifact, questions, case.work))


def answer_in_this_process(artifact: Path, questions: Questions, work: Path) -> Path:
    """What `Asking` does in a process of its own."""
    asked, answers = work / "questions.json", work / "answers.safetensors"
    asked.write_text(questions.model_dump_json())
    try:
        probe(artifact, asked, answers)
    except BuildError as error:
        raise StepError("qualify", str(error)) from error
    return answers
