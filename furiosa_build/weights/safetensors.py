"""Weights in safetensors files, mapped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from furiosa_build.core.errors import UserError
from furiosa_build.ir.tensors import Layout
from furiosa_build.weights.hf_layout import weight_files


class SafetensorsSource:
    """The tensors of several safetensors files. Raises UserError for a file that is not one."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file.name} is not a sound safetensors file: {error}",
                    where=str(file),
                    hint="the download or copy may be cut short; fetch it again",
                ) from error
            for name in opened.offset_keys():
                if name in self._files:
                    raise UserError(f"tensor {name} stands in two files", where=str(file))
                self._files[name] = opened

    def names(self) -> set[str]:
        return set(self._files)

    def layout(self, name: str) -> Layout:
        return Layout.of(self.read(name))

    def read(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)  # type: ignore[no-any-return]


def open_checkpoint(path: Path) -> SafetensorsSource:
    """The weights of a directory in Hugging Face layout, or of one file."""
    return SafetensorsSource([path / name for name in weight_files(path)] if path.is_dir() else [path])
