"""Infinity and NaN in a config.json, which Python writes and JSON does not have.

They are kept as transformers writes them in strict JSON: `{"__float__": "Infinity"}`, which it reads as well.
"""

from __future__ import annotations

import math
from typing import Any

_TAG = "__float__"
_VALUES = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def without_floats(value: Any) -> Any:
    """The same data, with what JSON cannot say as objects."""
    match value:
        case dict():
            return {key: without_floats(item) for key, item in value.items()}
        case list() | tuple():
            return [without_floats(item) for item in value]
        case float() if not math.isfinite(value):
            return {_TAG: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def with_floats(value: Any) -> Any:
    """The reverse of `without_floats`."""
    match value:
        case {"__float__": str(name), **rest} if not rest and name in _VALUES:
            return _VALUES[name]
        case dict():
            return {key: with_floats(item) for key, item in value.items()}
        case list():
            return [with_floats(item) for item in value]
    return value
