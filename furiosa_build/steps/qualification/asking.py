"""Asks an artifact, in a fresh process with the runtime alone."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from furiosa_build.steps.qualification.child import Child

if TYPE_CHECKING:
    from furiosa_build.runtime.probe import Questions


class Asking:
    """A context manager that has an artifact answer questions.

    The process is there from the beginning, so that it imports the runtime while the questions are made.

    Args:
        artifact: Its directory.
        work: A directory for the answers.
    """

    def __init__(self, artifact: Path, work: Path) -> None:
        self._artifact, self._answers = artifact, work / "answers.safetensors"
        self._waiting: Child | None = self._child()

    def __enter__(self) -> Asking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._waiting is not None:
            self._waiting.__exit__(kind, error, trace)

    def ask(self, questions: Questions) -> Path:
        """The file of the answers. Raises StepError if the artifact does not run."""
        child, self._waiting = self._waiting or self._child(), None
        with child:
            child.finish(questions.model_dump_json())
        return self._answers

    def _child(self) -> Child:
        arguments = str(self._artifact), "/dev/stdin", str(self._answers)
        return Child("the artifact", "furiosa_build.runtime.probe", *arguments)
