"""Checks a safetensors file by its header: 8 bytes of length, JSON, then the tensors' bytes without a gap."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from furiosa_build.core.errors import UserError

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_MAX_DIMENSIONS, _MAX_SIZE = 64, 1 << 63  # torch's; a product of many large numbers takes minutes
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BOOL": "bool",
    **{f"{sign}{bits}": f"{name}{bits}" for sign, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}
"""torch's names of the dtypes that safetensors has."""


def check_safetensors(path: Path) -> None:
    """Raises UserError, naming the file, when its header is malformed or does not agree with its size."""
    try:
        read_header(path)
    except ValueError as error:
        raise UserError(
            f"damaged parameter file {path.name}: {error}", where=str(path), hint="build or copy it again"
        ) from error


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors that the header describes, once it has been checked.

    Raises ValueError. Reads no more than the header, and not even that where it is too large.
    """
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"{size} bytes are too few for a header")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
        except RecursionError as error:
            raise ValueError("the header is nested too deep") from error
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")  # noqa: TRY004 (the file is at fault)
    header.pop("__metadata__", None)
    end = 0
    for begin, stop, name in sorted((*_extent(name, entry), name) for name, entry in header.items()):
        if begin != end:
            raise ValueError(f"tensor {name!r:.80} begins at {begin}, the one before it ends at {end}")
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"the tensors have {end} bytes, the file has {size - 8 - length} for them")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses two tensors of one name, which the format forbids: readers would differ in which one they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r:.80} stands in the header twice")
    return found


def _extent(name: str, entry: Any) -> tuple[int, int]:
    """Begin and end of a tensor's bytes, which agree with its dtype and shape."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            dtype in _BYTES
            and len(shape) <= _MAX_DIMENSIONS
            and all(type(size) is int and 0 <= size < _MAX_SIZE for size in shape)
        ):
            if end - begin != _BYTES[dtype] * math.prod(shape) or begin < 0:
                raise ValueError(f"tensor {name!r:.80}: {dtype} {shape} does not fill bytes {begin} to {end}")
            return begin, end
    raise ValueError(f"tensor {name!r:.80} is described by {entry!r:.120}")
