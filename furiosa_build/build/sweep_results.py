"""What has become of the points of a sweep: SWEEPS/NAME/ID/results.json and results.csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from furiosa_build.artifact import writer
from furiosa_build.artifact.schema import ARTIFACT_FILE, MANIFEST_FILE, Artifact, Manifest
from furiosa_build.build.sweep import Sweep
from furiosa_build.core.canonical_json import digest
from furiosa_build.core.files import replace_text

DIRECTORY = "sweeps"


@dataclass(frozen=True)
class PointResult:
    """What has become of a point.

    Attributes:
        number: The point's.
        overrides: What makes it differ from the others.
        artifact: The artifact's directory; None: it was not built. What follows is None then, too.
        artifact_id: The artifact's.
        size: Bytes of its files.
        programs: How many it has.
        own_seconds: What the steps took that only this point needs, when they were done.
        shared_seconds: What those took that other points need as well.
        qualification: How it qualified.
    """

    number: int
    overrides: tuple[str, ...]
    artifact: Path | None = None
    artifact_id: str | None = None
    size: int | None = None
    programs: int | None = None
    own_seconds: float | None = None
    shared_seconds: float | None = None
    qualification: dict[str, Any] | None = None


def results_of(sweep: Sweep) -> list[PointResult]:
    """A result for each point, once the sweep has run."""
    return [_result(sweep, number, point.overrides) for number, point in enumerate(sweep.points)]


def write_results(name: str, overrides: Sequence[str], results: Sequence[PointResult], cwd: Path) -> Path:
    """Writes the results; returns their directory, which is the same for the same recipe and overrides."""
    directory = cwd / DIRECTORY / name / digest([name, sorted(overrides)])[:12]
    directory.mkdir(parents=True, exist_ok=True)
    whole = {"recipe": name, "overrides": list(overrides), "points": [asdict(one) for one in results]}
    replace_text(directory / "results.json", json.dumps(whole, indent=1, default=str) + "\n")
    replace_text(directory / "results.csv", _csv(results))
    return directory


def _result(sweep: Sweep, number: int, overrides: tuple[str, ...]) -> PointResult:
    directory = sweep.results.get(number)
    if directory is None:
        return PointResult(number, overrides)
    manifest = Manifest.model_validate_json((directory / MANIFEST_FILE).read_bytes())
    artifact = Artifact.model_validate_json((directory / ARTIFACT_FILE).read_bytes())
    seconds = {True: 0.0, False: 0.0}
    for name, step in sweep.steps.items():
        if number in step.points:
            seconds[len(step.points) > 1] += sweep.outcomes[name].record.seconds
    return PointResult(
        number,
        overrides,
        directory,
        manifest.artifact_id,
        sum(file.size for file in manifest.files.values()),
        len(artifact.programs),
        round(seconds[False], 3),
        round(seconds[True], 3),
        json.loads(writer.qualification_file(directory).read_bytes()),
    )


def _csv(results: Sequence[PointResult]) -> str:
    """A line for each point; a column for each override's key, and for each figure."""
    rows = []
    for one in results:
        row = asdict(one)
        figures = row.pop("qualification") or {}
        del row["overrides"]
        keyed = dict(text.lstrip("+").partition("=")[::2] for text in one.overrides)
        rows.append({"number": row.pop("number"), **keyed, **row, **figures})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    table = csv.DictWriter(text, columns)
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
