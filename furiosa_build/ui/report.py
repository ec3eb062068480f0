"""What a build did, for machines and for people: VERSION.build-report.json and .html beside the artifact.

Times are real times, so the report is not part of the artifact.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build import __version__
from furiosa_build.core.events import ArtifactReady, BuildStarted, Event, StepFinished, StepStarted
from furiosa_build.core.files import replace_text
from furiosa_build.core.text import duration_text, memory_text, short_path, size_text
from furiosa_build.ui.json_events import step_data

if TYPE_CHECKING:
    from furiosa_build.build.build import Build

SCHEMA_VERSION = 1
_PARTS = ("params", "programs", "model", "draft")


class ReportFiles:
    """A listener that writes the report of a build that ran a step and ended well, and notes where it is."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._begin = 0.0
        self._started: dict[str, float] = {}
        self._steps: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        match event:
            case BuildStarted():
                self._begin, self._started, self._steps = event.time, {}, []
            case StepStarted():
                self._started[event.step] = event.time
            case StepFinished():
                self._steps.append(step_data(event, self._started.get(event.step)))
            case ArtifactReady() if event.ran:
                try:
                    told = f"report     {short_path(self._write(event))}"
                except OSError as error:
                    told = f"the report cannot be written: {error}"
                self._build.events.note(told)

    def _write(self, event: ArtifactReady) -> Path:
        """Returns the page for people."""
        data = self._data(event)
        for kind, text in (("json", json.dumps(data, indent=1) + "\n"), ("html", report_html(data))):
            path = event.directory.with_name(f"{event.directory.name}.build-report.{kind}")
            replace_text(path, text)
        return path

    def _data(self, event: ArtifactReady) -> dict[str, Any]:
        """The report as plain data: bytes and Unix seconds; null where unknown."""
        from furiosa_build.artifact.writer import qualification_file
        from furiosa_build.plan.budget.describe import kv_blocks_text
        from furiosa_build.ui.artifact_text import qualification_text

        build, directory = self._build, event.directory
        sizes = {part: _size(directory / part) for part in _PARTS if (directory / part).is_dir()}
        return {
            "schema_version": SCHEMA_VERSION,
            "recipe": build.spec.name,
            "spec": build.spec.model_dump(mode="json"),
            "version": directory.name,
            "artifact": str(directory),
            "kv_blocks": asdict(build.plan.kv_blocks),
            "kv_cache": kv_blocks_text(build.plan),
            "sizes": {**sizes, "all": _size(directory)},
            "qualification": json.loads(qualification_file(directory).read_bytes()),
            "qualified": qualification_text(directory),
            "furiosa_build": __version__,
            "host": {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
            "begin": self._begin,
            "end": event.time,
            "steps": self._steps,
        }


def report_html(data: dict[str, Any]) -> str:
    """A page by itself: a timeline of the steps, and the sizes of the artifact's parts."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("furiosa_build.ui"), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {
        "size": size_text,
        "memory": memory_text,
        "duration": duration_text,
        "percent": lambda share: f"{share:.2%}",
        "utc": lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds)),
        "indented_json": lambda value: json.dumps(value, indent=1),
    }
    return environment.get_template("report.html.jinja").render(
        data,
        length=max(data["end"] - data["begin"], 0.001),
        ran=[step for step in data["steps"] if step["begin"] is not None],
        reused=[step for step in data["steps"] if step["begin"] is None],
        parts=_PARTS,
    )


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
