"""Weights in safetensors files, mapped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.core.errors import UserError
from furiosa_build.core.safetensors_header import DTYPES, read_header
from furiosa_build.core.text import path_text
from furiosa_build.ir.tensors import Layout
from furiosa_build.weights.format import WeightFormat

if TYPE_CHECKING:
    from torch import Tensor


class Safetensors(WeightFormat):
    """https://huggingface.co/docs/safetensors."""

    name = "safetensors"

    def recognizes(self, file: Path) -> bool:
        with file.open("rb") as opened:
            return opened.read(9)[8:] == b"{"

    def check(self, file: Path) -> None:
        read_header(file)

    def open(self, files: Sequence[Path]) -> SafetensorsSource:
        return SafetensorsSource(files)

    def layouts(self, file: Path) -> dict[str, Layout]:
        return {
            name: Layout(DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]))
            for name, entry in read_header(file).items()
        }


class SafetensorsSource:
    """The tensors of several safetensors files. Raises UserError for a file that is not one."""

    def __init__(self, files: Sequence[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Any] = {}
        for file in files:
            path_text(file)
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
