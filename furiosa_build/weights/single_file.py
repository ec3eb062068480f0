"""One file that holds all weights, in any format that can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from furiosa_build.core.errors import UserError
from furiosa_build.weights.formats import format_of
from furiosa_build.weights.header import Header, header_of
from furiosa_build.weights.model_source import ModelSource, Reference


class WeightFile(ModelSource):
    """One file of weights; of some formats it has the model's config too."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def sniff(cls, reference: Reference) -> WeightFile | None:
        return next((cls(path) for path in reference.paths() if path.is_file()), None)

    def config(self) -> dict[str, Any]:
        found = format_of(self.path)
        config = found.config(self.path)
        if config is None:
            raise UserError(
                f"{self.path.name} does not describe its model: a {found.name} file holds tensors only",
                where=str(self.path),
                hint="name the model's directory or hub id, and this file by model.param_file_path",
            )
        return config

    def header(self) -> Header:
        return header_of(self.weight_files())

    def weight_files(self) -> dict[str, Path]:
        """Listed under one name, whatever the file is called: weights are the same under another name."""
        return {f"model.{format_of(self.path).name}": self.path}
