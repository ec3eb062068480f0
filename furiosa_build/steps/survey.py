"""survey: what kinds of supertask the model has. Runs before there is a plan, since the plan depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OUTPUT = "outline.json"


def run(request: dict[str, Any], output: Path) -> None:
    """request: `hf_config`. Writes outline.json."""
    from furiosa_build.models.analyze import survey

    (output / OUTPUT).write_text(survey(request["hf_config"]).model_dump_json())
