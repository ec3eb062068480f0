"""survey: what kinds of supertask the model has. Runs before there is a plan, since the plan depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from furiosa_build.steps.base import Inputs, Job, Request

OUTPUT = "outline.json"


class SurveyRequest(Request):
    """`hf_config`: the fields of the model's config.json."""

    hf_config: dict[str, Any]


class Survey(Job[SurveyRequest]):
    """Writes outline.json."""

    name = "survey"
    Request = SurveyRequest
    packages = ("torch", "transformers")

    def run(self, request: SurveyRequest, inputs: Inputs, output: Path) -> None:
        from furiosa_build.models.analyze import survey

        (output / OUTPUT).write_text(survey(request.hf_config).model_dump_json())
