"""The formats of weight files that can be read. A new one is a file of its own and an entry here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from furiosa_build.core.errors import UserError
from furiosa_build.ir.tensors import Layout
from furiosa_build.weights.format import WeightFormat
from furiosa_build.weights.safetensors import Safetensors

if TYPE_CHECKING:
    from furiosa_build.weights.source import TensorSource

_USUAL = Safetensors()

FORMATS: list[WeightFormat] = [_USUAL]


def format_of(file: Path) -> WeightFormat:
    """The format of a file: the one that recognizes it, else the usual one, which says what is wrong with it."""
    return next((known for known in FORMATS if known.recognizes(file)), _USUAL)


def check_weight_file(file: Path) -> None:
    """Raises UserError unless a weight file is sound, as far as can be seen without reading its tensors."""
    with _must_be_sound(file) as found:
        found.check(file)


def layouts_of(file: Path) -> dict[str, Layout]:
    """dtype and shape of the tensors of a weight file, by name. Raises UserError unless it is sound."""
    with _must_be_sound(file) as found:
        return found.layouts(file)


@contextmanager
def _must_be_sound(file: Path) -> Iterator[WeightFormat]:
    found = format_of(file)
    try:
        yield found
    except ValueError as error:
        raise UserError(
            f"{file.name} is not a sound {found.name} file: {error}",
            where=str(file),
            hint="the download or copy may be cut short; fetch it again",
        ) from error


def open_weight_files(files: Sequence[Path]) -> TensorSource:
    """The tensors of files of one format."""
    return (format_of(files[0]) if files else _USUAL).open(files)
