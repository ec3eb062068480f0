"""A directory in Hugging Face layout as a source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.core.errors import UserError
from furiosa_build.weights.adapters import check_no_adapter
from furiosa_build.weights.header import Header, header_of
from furiosa_build.weights.hf_layout import (
    INDEX_FILE,
    MODEL_FILES,
    ORIGINAL_PATTERNS,
    check_file,
    find_files,
    read_json,
    weight_files,
)
from furiosa_build.weights.model_source import ModelSource, Reference

if TYPE_CHECKING:
    from furiosa_build.quant.compressed_tensors import QuantizedCheckpoint


class ModelDirectory(ModelSource):
    """A directory in Hugging Face layout: config.json, the tokenizer's files, safetensors files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def sniff(cls, reference: Reference) -> ModelDirectory | None:
        return next((cls(path) for path in reference.paths() if path.is_dir()), None)

    def config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        check_no_adapter(self.path)
        if not path.is_file():
            raise UserError(
                "the model's directory has no config.json", where=str(self.path), hint="is it in Hugging Face layout?"
            )
        return read_json(path)

    def quantization(self, model: Mapping[str, Any], layers: int | None) -> QuantizedCheckpoint:
        from furiosa_build.quant.compressed_tensors import KEY, parse_checkpoint

        path = self.path / "config.json"
        check_no_adapter(self.path)
        if not path.is_file():
            raise UserError(
                "the quantized checkpoint has no config.json",
                where=f"{KEY}: {self.path}",
                valid="a directory with a compressed-tensors checkpoint: config.json and safetensors files",
            )
        return parse_checkpoint(path, read_json(path), model, layers)

    def model_files(self) -> dict[str, Path]:
        return find_files(self.path, MODEL_FILES)

    def original_files(self) -> dict[str, Path]:
        found = {
            path.relative_to(self.path).as_posix(): path
            for pattern in ORIGINAL_PATTERNS
            for path in self.path.glob(pattern)
            if path.is_file()
        }
        for path in found.values():
            if path.suffix != ".safetensors":
                check_file(path, self.path)
        return found

    def header(self) -> Header:
        files = self.weight_files()
        index = files.pop(INDEX_FILE, None)
        metadata = {} if index is None else read_json(index).get("metadata")
        dtype = metadata.get("dtype") if isinstance(metadata, dict) else None
        return header_of(files, dtype)

    def weight_files(self) -> dict[str, Path]:
        check_no_adapter(self.path)
        config = self.path / "config.json"
        named = read_json(config).get("transformers_weights") if config.is_file() else None
        return {name: self.path / name for name in weight_files(self.path, named)}
