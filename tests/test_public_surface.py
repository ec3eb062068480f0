"""What people import and call: names, parameters and defaults, as public_surface.txt has them.

A change here is a change for users: it belongs into CHANGELOG.md, and into the text file in the same commit. The new
text is printed by `python tests/test_public_surface.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("public_surface.txt")
NAMES = {
    "furiosa_build": ["ArtifactBuilder", "LLM", "LLMEngine", "AsyncLLMEngine", "SamplingParams"],
    "furiosa_build.artifact.builder": ["ArtifactBuilder"],
    "furiosa_build.artifact.reader": ["open_artifact"],
    "furiosa_build.models.config_types": ["KvCacheSharingAcrossBeamsConfig", "SchedulerConfig"],
    "furiosa_build.runtime": [
        "LLM",
        "AsyncEngineArgs",
        "AsyncLLMEngine",
        "EngineArgs",
        "LLMEngine",
        "RequestOutput",
        "SamplingParams",
    ],
}


def surface() -> str:
    """Every name with where it is imported from; what it has is written where it comes first."""
    lines: list[str] = []
    seen: dict[int, str] = {}
    for module, names in NAMES.items():
        for name in names:
            value = getattr(import_module(module), name)
            where = f"{module}.{name}"
            if id(value) in seen:
                lines.append(f"{where} is {seen[id(value)]}")
                continue
            seen[id(value)] = where
            lines.append(f"{where}{_signature(value)}")
            if inspect.isclass(value):
                lines += [f"    {line}" for line in sorted(_members(value))]
    return "\n".join(lines) + "\n"


def _signature(value: object) -> str:
    assert callable(value)
    try:
        signature = inspect.signature(value)
    except ValueError:
        return ""
    parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(parameters)).replace(" = ", "=")


def _members(kind: type) -> Iterator[str]:
    if dataclasses.is_dataclass(kind):
        yield from (f".{field.name}" for field in dataclasses.fields(kind) if not field.name.startswith("_"))
    for name in dir(kind):
        defined = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
        ours = any(name in vars(base) and base.__module__.startswith("furiosa_build") for base in kind.__mro__)
        if name.startswith("_") or not ours:
            continue
        if isinstance(defined, property):
            yield f".{name}"
        elif callable(getattr(kind, name)):
            yield f".{name}{_signature(getattr(kind, name))}"


def test_the_public_surface_is_as_written_down() -> None:
    assert surface() == SNAPSHOT.read_text()


def test_importing_the_package_is_cheap() -> None:
    """Neither torch nor the command line is imported before a name is used."""
    import subprocess

    code = (
        "import sys, furiosa_build; print(sorted({'torch', 'pydantic', 'typer', 'doit', 'hydra'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout == "[]\n"


def test_the_package_lists_its_names() -> None:
    package = import_module("furiosa_build")
    assert sorted(package.__all__) == sorted(NAMES["furiosa_build"])
    assert set(package.__all__) <= set(dir(package))
    assert not hasattr(package, "nothing")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.stdout.write(surface())
