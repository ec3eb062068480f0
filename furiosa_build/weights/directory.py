"""A directory in Hugging Face layout as a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from furiosa_build.core.errors import UserError
from furiosa_build.weights.hf_layout import INDEX_FILE, MODEL_FILES, check_file, read_json, weight_files
from furiosa_build.weights.model_source import ModelSource, Reference


class ModelDirectory(ModelSource):
    """A directory in Hugging Face layout: config.json, the tokenizer's files, safetensors files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def sniff(cls, reference: Reference) -> ModelDirectory | None:
        return next((cls(path) for path in reference.paths() if path.is_dir()), None)

    def config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        if not path.is_file():
            raise UserError(
                "the model's directory has no config.json", where=str(self.path), hint="is it in Hugging Face layout?"
            )
        return read_json(path)

    def model_files(self) -> dict[str, Path]:
        found = {name: self.path / name for name in MODEL_FILES if (self.path / name).is_file()}
        for path in found.values():
            check_file(path)
        return found

    def weight_files(self) -> dict[str, Path]:
        check_file(self.path / INDEX_FILE)
        names = [*weight_files(self.path), *([INDEX_FILE] if (self.path / INDEX_FILE).is_file() else [])]
        return {name: self.path / name for name in names}
