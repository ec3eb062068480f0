"""What a build did, for machines and for people: VERSION.build-report.json and .html beside the artifact.

Times are real times, so the report is no part of the artifact.
"""

from __future__ import annotations

import html
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build import __version__
from furiosa_build.core.text import duration_text, memory_text, size_text
from furiosa_build.plan.budget.describe import kv_blocks_text

if TYPE_CHECKING:
    from furiosa_build.build.build import Build

SCHEMA_VERSION = 1
_PARTS = ("params", "programs", "model", "draft")


@dataclass
class StepReport:
    """One step. `state`: `ran`, `reused` or `up to date`. Times are Unix seconds; None of a step that did not run."""

    step: str
    state: str
    begin: float | None = None
    end: float | None = None


@dataclass
class Record:
    """What has happened in a build so far."""

    begin: float = field(default_factory=time.time)
    steps: dict[str, StepReport] = field(default_factory=dict)

    def begins(self, step: str) -> None:
        """A step begins."""
        self.steps[step] = StepReport(step, "running", time.time())

    def ends(self, step: str, state: str) -> None:
        """A step has ended, or had nothing to do."""
        report = self.steps.setdefault(step, StepReport(step, state))
        report.state, report.end = state, time.time() if report.begin is not None else None


def report_data(build: Build, record: Record) -> dict[str, Any]:
    """The report as plain data: bytes and Unix seconds; null where unknown."""
    directory = build.version_directory
    sizes = {part: _size(directory / part) for part in _PARTS if (directory / part).is_dir()}
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": build.spec.name,
        "spec": build.spec.model_dump(mode="json"),
        "version": build.version_directory.name,
        "artifact": str(directory),
        "kv_blocks": asdict(build.plan.kv_blocks),
        "kv_cache": kv_blocks_text(build.plan),
        "sizes": {**sizes, "all": _size(directory)},
        "furiosa_build": __version__,
        "host": {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
        "begin": record.begin,
        "end": time.time(),
        "steps": [step_data(build, one) for one in record.steps.values()],
    }


def write_report(build: Build, record: Record) -> Path:
    """Writes both files; returns the one for people."""
    data = report_data(build, record)
    directory = build.version_directory
    paths = [directory.with_name(f"{directory.name}.build-report.{kind}") for kind in ("json", "html")]
    for path, text in zip(paths, (json.dumps(data, indent=1) + "\n", report_html(data)), strict=True):
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_text(text)
        new.replace(path)
    return paths[1]


def report_html(data: dict[str, Any]) -> str:
    """A page by itself: a timeline of the steps, and the sizes of the artifact's parts."""
    ran = [one for one in data["steps"] if one["begin"] is not None]
    begin = data["begin"]
    length = max(data["end"] - begin, 0.001)
    rows = "".join(_row(one, begin, length) for one in ran)
    reused = [one["step"] for one in data["steps"] if one["begin"] is None]
    sizes = data["sizes"]
    parts = "".join(_part(name, sizes[name], sizes["all"]) for name in _PARTS if name in sizes)
    escape = html.escape
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(begin))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(data["recipe"])}: build report</title>
<style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ padding: 2px 8px; text-align: left; white-space: nowrap; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }} td.wide {{ width: 50%; }}
.lane {{ background: #8881; height: 1em; position: relative; }}
.bar {{ background: #36c; height: 1em; min-width: 2px; position: absolute; }}
</style></head><body>
<h1>{escape(data["recipe"])}</h1>
<p>artifact {escape(data["version"])}, {escape(size_text(sizes["all"]))}: {escape(data["artifact"])}<br>
built {when} in {escape(duration_text(length))}, by furiosa_build {escape(data["furiosa_build"])};
{len(ran)} steps ran, {len(reused)} were there already<br>
KV cache: {escape(data["kv_cache"])}</p>
<h2>Steps</h2>
<table><tr><th>step</th><th>state</th><th>seconds</th><th>peak memory</th><th>output</th><th>when</th></tr>
{rows}</table>
<p>there already: {escape(", ".join(reused)) or "none"}</p>
<h2>Sizes</h2>
<table>{parts}</table>
<h2>Recipe</h2>
<pre>{escape(json.dumps(data["spec"], indent=1))}</pre>
</body></html>
"""


def _row(one: dict[str, Any], begin: float, length: float) -> str:
    left, width = (one["begin"] - begin) / length, (one["end"] - one["begin"]) / length
    return (
        f"<tr><td>{html.escape(one['step'])}</td><td>{html.escape(one['state'])}</td>"
        f'<td class="number">{one["seconds"]:.1f}</td>'
        f'<td class="number">{memory_text(one["peak_memory"])}</td>'
        f'<td class="number">{size_text(one["bytes"])}</td>'
        f'<td class="wide"><div class="lane"><div class="bar" style="left:{left:.2%};width:{width:.2%}"></div></div>'
        "</td></tr>\n"
    )


def _part(name: str, size: int, whole: int) -> str:
    return (
        f'<tr><td>{name}</td><td class="number">{size_text(size)}</td><td class="wide"><div class="lane">'
        f'<div class="bar" style="left:0;width:{size / max(whole, 1):.2%}"></div></div></td></tr>\n'
    )


def step_data(build: Build, one: StepReport) -> dict[str, Any]:
    """A step's figures as plain data."""
    made = build.done[one.step].record
    return {
        "step": one.step,
        "state": one.state,
        "begin": one.begin,
        "end": one.end,
        "seconds": made.seconds,
        "peak_memory": made.peak_memory,
        "peak_mapped": made.peak_mapped,
        "bytes": sum(output.size for output in made.outputs.values()),
        "key": made.key,
    }


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
