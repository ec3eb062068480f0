"""What a kind of step is: how it is planned, what its key and its costs are made of, its request, and its work.

A request says by digest which files it is about and has no path of a machine: it can be carried out on any machine that
has a store with these files. The rest is what a build asks before; it needs neither torch nor a store.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from furiosa_build.plan.budget.costs import Costs
    from furiosa_build.plan.budget.durations import KnownStep
    from furiosa_build.plan.planner import PlannedStep, Site
    from furiosa_build.weights.listing import ListedWeights, ModelFiles, Original


class Request(BaseModel):
    """What one step is to do.

    `inputs` are the files that it reads: name -> sha256 (hex).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
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


class OutputFile(Protocol):
    """A file that a step has made: its size in bytes and its sha256 (hex)."""

    @property
    def size(self) -> int: ...
    @property
    def sha256(self) -> str: ...


class BuildState(Protocol):
    """What is known in a build when a step is to be done: outputs of steps by their names in the plan, and more."""

    def files(self, step: str) -> Mapping[str, OutputFile]:
        """The outputs of a step, by relative path."""
        ...

    def json(self, step: str, path: str) -> Any:
        """The content of one of them."""
        ...

    def source(self, model_id: str) -> tuple[ListedWeights, ModelFiles, Original]:
        """The files that a model's build begins with, which have been read."""
        ...

    def tools(self, step: PlannedStep) -> Mapping[str, str]:
        """The versions that are part of a step's key."""
        ...


class Entry(NamedTuple):
    """What a plan says of a step: see `plan.planner.PlannedStep`."""

    own_name: str
    description: str
    needs: Mapping[str, str]
    reads: Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """What a step reads and writes of weights and programs, in bytes."""

    read: int = 0
    written: int = 0


class Likeness(NamedTuple):
    """Steps of a kind that are `alike` take as long as each other; where they have a size, in proportion to it."""

    alike: tuple[str | bool, ...] = ()
    size: int | None = None


R = TypeVar("R", bound=Request)


class Job(ABC, Generic[R]):
    """Work with a typed request, whose key is known before it is done. Instances hold no state.

    Attributes:
        name: What it is called in keys and in the store.
        Request: The type of its requests.
        worker: Where it runs: a worker process for `builder`s or for `compiler`s, or `here`, in the build's process,
            where nothing may import torch.
        packages: The packages whose versions are part of its key; its own, if that is not this project's.
        optional_packages: So are the versions of these, where they are installed.
        backend_tools: So are the tools of the backend.
        library_tools: So is what determines the backend's library.
        modules: Modules of this project that it runs beside its own.
        backend_code: It runs the backend.
        uses_schemes: It runs the code of the schemes that the model's weights have.
    """

    name: ClassVar[str]
    Request: type[R]
    worker: ClassVar[Literal["here", "builder", "compiler"]] = "builder"
    packages: ClassVar[tuple[str, ...]] = ()
    optional_packages: ClassVar[tuple[str, ...]] = ()
    backend_tools: ClassVar[bool] = False
    library_tools: ClassVar[bool] = False
    modules: ClassVar[tuple[str, ...]] = ()
    backend_code: ClassVar[bool] = False
    uses_schemes: ClassVar[bool] = False

    def runs_backend(self, reads: Mapping[str, Any]) -> bool:
        """Whether work whose key has these `reads` runs the backend: its code is part of the key then."""
        del reads
        return self.backend_code

    @abstractmethod
    def run(self, request: R, inputs: Inputs, output: Path) -> Mapping[str, str] | None:
        """Writes the outputs into the directory `output`, as the request says.

        Returns the sha256 of outputs that it knows already, by relative path. Raises UserError for what the user has to
        mend; anything else that is raised makes the step fail.
        """


class Step(Job[R]):
    """A kind of step of a build.

    Attributes:
        label: What it is called where people read of all steps of the kind.
        scope: What a step of this kind is planned for: each `model`, each `program` of each model (a kind of supertask
            in a bucket), or the `artifact`.
        alone: It comes last, when no other step runs.
        makes: What others take from it, such as `checkpoint`: from the last step of their model that makes it.
        reads_source: Its inputs are the files that the build begins with.
        product: What its outputs are, where disk space is counted.
        kept: The disk that they are kept on.
    """

    label: ClassVar[str]
    scope: ClassVar[Literal["model", "program", "artifact"]] = "model"
    alone: ClassVar[bool] = False
    makes: ClassVar[str] = ""
    reads_source: ClassVar[bool] = False
    product: ClassVar[str] = "parameters"
    kept: ClassVar[Literal["store", "output", "downloads"]] = "store"

    def applies(self, site: Site) -> bool:
        """Whether there is such a step at `site`."""
        del site
        return True

    @abstractmethod
    def plan(self, site: Site) -> Entry:
        """What a plan says of the step that is planned at `site`."""

    @abstractmethod
    def request(self, step: PlannedStep, state: BuildState) -> R:
        """What the step is to do. The steps that it needs are done."""

    def work(self, step: PlannedStep, costs: Costs) -> Work:
        """What the step reads and writes."""
        return Work()

    def scratch(self, step: PlannedStep, costs: Costs) -> int:
        """Bytes that the step writes beside its outputs, and that are gone or reused afterwards."""
        return 0

    def held(self, step: PlannedStep, costs: Costs) -> int:
        """Bytes of memory that the step takes beside what its worker process takes at any rate."""
        return 0

    def worker_memory(self, step: PlannedStep, costs: Costs) -> int:
        """Bytes of memory that its worker process takes."""
        return costs.builder_worker

    def likeness(self, step: KnownStep) -> Likeness | None:
        """Which steps of this kind the step is comparable with; None: with none."""
        return Likeness()
