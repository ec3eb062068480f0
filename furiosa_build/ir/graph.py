"""A traced graph as plain data: a flat list of operator calls.

Values are numbered: inputs first, then constants, then one number a node.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from furiosa_build.ir.tensors import TensorSpec


class Constant(BaseModel):
    """A small tensor the graph owns, such as rotary frequencies. `data` is base64 of its little-endian bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    dtype: str
    shape: list[int]
    data: str


class Call(BaseModel):
    """One node: `op` is `aten.NAME.OVERLOAD`; arguments are JSON, tensors as `{"ref": number}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    op: str
    args: list[Any]
    kwargs: dict[str, Any]


class GraphData(BaseModel):
    """The JSON form of a graph. `results` numbers the values that become `outputs`, in order."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    inputs: list[TensorSpec]
    constants: list[Constant]
    nodes: list[Call]
    results: list[int]
    outputs: list[TensorSpec]
