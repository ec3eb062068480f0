"""What happens in a build, as plain data. The build emits events; what people and machines see of it are listeners.

Events of one build arrive one at a time, in order: first `BuildStarted` unless the build is refused before it, last
`BuildFinished`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

StepState = Literal["ran", "reused", "up to date"]
"""How a step finished: it did its work; another build had done it meanwhile, or only publishing was to do; there was
nothing to do."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened, at `time` (Unix seconds)."""

    time: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class BuildStarted(Event):
    """A build starts.

    Attributes:
        recipe: The recipe's name.
        steps: The steps that the build may come to, in order.
        expected: The steps that are to do, with the seconds that each is expected to take; None: unknown.
        compile_workers: How many programs are compiled at a time.
    """

    recipe: str
    steps: tuple[str, ...]
    expected: Mapping[str, float | None]
    compile_workers: int


@dataclass(frozen=True, kw_only=True)
class StepStarted(Event):
    """A step starts. `progress_file` counts the bytes that it streams, for `core.progress.read`; None: nothing does."""

    step: str
    progress_file: Path | None


@dataclass(frozen=True, kw_only=True)
class StepFinished(Event):
    """A step is done.

    Attributes:
        step: The step's name.
        state: How it came to be done.
        seconds: Time that its work took when it was done, in this build or in an earlier one.
        peak_memory: Bytes of private memory at the peak of that work; None: unknown.
        peak_mapped: Bytes of mapped files at the peak of that work; None: unknown.
        size: Bytes of its output.
        key: The digest of all that its output depends on.
    """

    step: str
    state: StepState
    seconds: float
    peak_memory: int | None
    peak_mapped: int | None
    size: int
    key: str


@dataclass(frozen=True, kw_only=True)
class Note(Event):
    """Something that the person who waits should know."""

    text: str


@dataclass(frozen=True, kw_only=True)
class SurveyStarted(Event):
    """transformers is asked about the model: once for what it is, some seconds, before the build can be planned."""


@dataclass(frozen=True, kw_only=True)
class ErrorOccurred(Event):
    """What ends the build. `status` is the exit status that stands for it; a bug of this program has a `traceback`."""

    message: str
    status: int
    traceback: str = ""


@dataclass(frozen=True, kw_only=True)
class Interrupted(Event):
    """The build was told to stop by the signal of that name; the steps that ran were ended."""

    signal: str


@dataclass(frozen=True, kw_only=True)
class ArtifactReady(Event):
    """The artifact is built and qualified, in `directory`. `ran`: how many steps did work for it."""

    directory: Path
    ran: int


@dataclass(frozen=True, kw_only=True)
class BuildFinished(Event):
    """The last event.

    Attributes:
        status: 0, or the exit status of what ended the build.
        ran: Steps that did work; their output is kept in the store however the build ended.
        up_to_date: Steps that had nothing to do.
        seconds: Time that the build took.
        artifact: The artifact's directory; None when the build did not come so far, or was not asked to.
    """

    status: int
    ran: int
    up_to_date: int
    seconds: float
    artifact: Path | None = None


@dataclass(frozen=True, kw_only=True)
class CheckFinished(Event):
    """The artifact was built a second time without the store. `differing` has a line for each file that differs."""

    directory: Path
    differing: tuple[str, ...]


Listener = Callable[[Event], None]


class Emitter:
    """Passes events on to listeners, one event at a time. A listener may emit further ones itself."""

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self.listeners = list(listeners)
        self._lock = threading.RLock()  # steps run in several threads

    def emit(self, event: Event) -> None:
        """Calls the listeners in turn."""
        with self._lock:
            for listener in self.listeners:
                listener(event)

    def note(self, text: str) -> None:
        """Emits a note."""
        self.emit(Note(text=text))
