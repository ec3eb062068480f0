"""Names of dtypes, as torch spells them, and how many bytes a number has."""

from __future__ import annotations

from collections.abc import Mapping

ITEMSIZE: Mapping[str, int] = {
    "complex128": 16,
    "complex64": 8,
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
FLOATS = ("float64", "float32", "bfloat16", "float16")
"""What weights that are not quantized may be."""
