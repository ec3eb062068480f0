"""What a checkpoint stores, by the headers of its files: nothing of a tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from furiosa_build.core.file_digests import Extent
from furiosa_build.core.safetensors_header import read_header
from furiosa_build.ir.dtypes import FLOATS
from furiosa_build.ir.tensors import Layout
from furiosa_build.weights.formats import format_of, layouts_of
from furiosa_build.weights.safetensors import Safetensors


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
    return Header.of({name: layouts_of(path) for name, path in sorted(files.items())}, dtype)


def same_bytes(files: Sequence[Path], one: str, other: str, hash_part: Callable[[Path, Extent], str]) -> bool:
    """Whether two tensors of safetensors files have the same dtype, shape and bytes; others count as different.

    `hash_part` gives the sha256 of a part of a file.
    """
    found: dict[str, tuple[Path, dict[str, Any], Extent]] = {}
    for path in files:
        if isinstance(format_of(path), Safetensors):
            entries = read_header(path)
            found |= {
                name: (path, entries[name], _extent(path, entries[name])) for name in (one, other) if name in entries
            }
    if len(found) < 2:
        return one == other
    (path, entry, extent), (other_path, other_entry, other_extent) = found[one], found[other]
    if (entry["dtype"], entry["shape"]) != (other_entry["dtype"], other_entry["shape"]):
        return False
    return hash_part(path, extent) == hash_part(other_path, other_extent)


def _extent(path: Path, entry: Mapping[str, Any]) -> Extent:
    """Where a tensor's bytes are in a file."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    begin, end = entry["data_offsets"]
    return start + begin, start + end
