"""What a checkpoint stores, by the headers of its files: nothing of a tensor is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from furiosa_build.core.safetensors_header import read_header
from furiosa_build.ir.dtypes import FLOATS
from furiosa_build.ir.tensors import Layout
from furiosa_build.weights.formats import check_weight_file, format_of
from furiosa_build.weights.safetensors import Safetensors

_CHUNK = 1 << 24


class Header(NamedTuple):
    """dtype and shape of every stored tensor, and the dtype of them all, as transformers finds it: that of the first
    floating point tensor, in the order of names, of the first file."""

    layouts: Mapping[str, Layout]
    dtype: str | None

    @classmethod
    def of(cls, files: Mapping[str, Mapping[str, Layout]], dtype: str | None = None) -> Header:
        """The header of files, each with what it stores; `dtype`: what their index says."""
        first = next(iter(files.values()), {})
        found = next((first[name].dtype for name in sorted(first) if first[name].dtype in FLOATS), None)
        return cls({name: layout for layouts in files.values() for name, layout in layouts.items()}, dtype or found)


def header_of(files: Mapping[str, Path], dtype: str | None = None) -> Header:
    """The header of weight files, by their names. Raises UserError for one that is not sound."""
    for path in files.values():
        check_weight_file(path)
    return Header.of({name: format_of(path).layouts(path) for name, path in sorted(files.items())}, dtype)


def same_bytes(files: Sequence[Path], one: str, other: str) -> bool:
    """Whether two tensors of safetensors files have the same dtype, shape and bytes; others count as different."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in files:
        if isinstance(format_of(path), Safetensors):
            entries = read_header(path)
            found |= {name: (path, entries[name]) for name in (one, other) if name in entries}
    if len(found) < 2:
        return one == other
    (path, entry), (other_path, other_entry) = found[one], found[other]
    if (entry["dtype"], entry["shape"]) != (other_entry["dtype"], other_entry["shape"]):
        return False
    with path.open("rb") as file, other_path.open("rb") as other_file:
        left = _seek(file, entry)
        _seek(other_file, other_entry)
        while left > 0:
            size = min(left, _CHUNK)
            if file.read(size) != other_file.read(size):
                return False
            left -= size
    return True


def _seek(file: BinaryIO, entry: Mapping[str, Any]) -> int:
    """Goes to where a tensor's bytes begin; returns how many they are."""
    begin, end = entry["data_offsets"]
    file.seek(0)
    file.seek(8 + int.from_bytes(file.read(8), "little") + begin)
    return int(end - begin)
