"""An engine that is loaded to be measured."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from furiosa_build.backends.cpu import processor_name
from furiosa_build.core.peak_memory import Usage, usage
from furiosa_build.core.system import this_machine
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.engine_args import EngineArgs


@dataclass(frozen=True)
class LoadedEngine:
    """An engine and what it took to load it.

    Attributes:
        engine: The engine.
        machine: The processor and the number of its cores that this process may run on.
        seconds: From opening the artifact to an engine that is ready.
        memory: Bytes that it took; None where the system does not say.
    """

    engine: LLMEngine
    machine: str
    seconds: float
    memory: Usage | None


def load_engine(args: EngineArgs) -> LoadedEngine:
    """Loads an artifact. Raises UserError if it cannot be used."""
    before = usage(os.getpid())
    begin = time.perf_counter()
    engine = LLMEngine.from_engine_args(args)
    seconds = time.perf_counter() - begin
    after = usage(os.getpid())
    memory = None
    if before is not None and after is not None:
        memory = Usage(after.private - before.private, after.mapped - before.mapped)
    return LoadedEngine(engine, f"{processor_name()}, {this_machine().cores} cores", seconds, memory)
