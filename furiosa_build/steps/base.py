"""The kinds of step. What a step does is a method of its kind; what it does it with is a request, and the files of it.

A request says by digest which files it is about and has no path of a machine: it can be carried out on any machine that
has a store with these files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict


class Request(BaseModel):
    """What one step is to do.

    `inputs` are the files that it reads: name -> sha256 (hex).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    inputs: dict[str, str] = {}


@dataclass(frozen=True)
class Inputs:
    """What a step finds on the machine that it runs on.

    Attributes:
        files: The inputs of its request, by name: read-only files.
        scratch: A directory for caches of its tools; nothing may depend on what is in it. It need not exist.
    """

    files: Mapping[str, Path]
    scratch: Path

    def under(self, prefix: str) -> dict[str, Path]:
        """The files whose names begin with `prefix`, by the rest of their names."""
        return {name.removeprefix(prefix): path for name, path in self.files.items() if name.startswith(prefix)}


R = TypeVar("R", bound=Request)


class Step(ABC, Generic[R]):
    """A kind of step. Instances hold no state.

    Attributes:
        name: What the kind is called in keys and in the store.
        Request: The type of its requests.
    """

    name: ClassVar[str]
    Request: type[R]

    @abstractmethod
    def run(self, request: R, inputs: Inputs, output: Path) -> Mapping[str, str] | None:
        """Writes the step's outputs into the directory `output`, as its request says.

        Returns the sha256 of outputs that it knows already, by relative path. Raises UserError for what the user has to
        mend; anything else that is raised makes the step fail.
        """
