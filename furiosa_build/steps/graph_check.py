"""graph-check: whether the backend can compile a model's graphs. Before there is a plan: a model is refused then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from furiosa_build.backends.registry import get_backend
from furiosa_build.core.errors import UserError
from furiosa_build.ir.kv_cache import KvCacheDtype
from furiosa_build.ir.segment import Segment
from furiosa_build.steps.base import Inputs, Job, Request

_SHAPES = {"prefill": (1, 8, 8), "decode": (2, 1, 8)}
"""Sizes of buckets, small: which operators a graph calls does not depend on them."""


class GraphCheckRequest(Request):
    """A model and a backend.

    Attributes:
        hf_config: The fields of the model's config.json.
        layers: One of each kind.
        backend: The backend's name.
        kv_cache_dtype: What KV caches hold.
    """

    hf_config: dict[str, Any]
    layers: list[int]
    backend: str
    kv_cache_dtype: KvCacheDtype = "auto"


class GraphCheck(Job[GraphCheckRequest]):
    """Finds nothing, or raises UserError."""

    name = "graph-check"
    Request = GraphCheckRequest
    packages = ("torch", "transformers")
    backend_tools = backend_code = True

    def run(self, request: GraphCheckRequest, inputs: Inputs, output: Path) -> None:
        from furiosa_build.models.tracing import BucketShape, Tracer

        backend = get_backend(request.backend)
        tracer = Tracer(request.hf_config, {}, kv_cache_dtype=request.kv_cache_dtype)
        model = type(tracer.skeleton.model).__name__
        for bucket, shape in _SHAPES.items():
            for part, segment in _parts(request.layers).items():
                try:
                    backend.check_graph(tracer.trace(BucketShape(*shape), segment).whole)
                except UserError as error:
                    what = f"{error.what}, which {part} of {model} needs ({bucket})"
                    raise UserError(what, where=error.where, valid=error.valid, hint=error.hint) from error


def _parts(layers: list[int]) -> dict[str, Segment]:
    return {
        "what comes before the layers": Segment(first=True),
        **{f"layer {layer}": Segment(layers=(layer,)) for layer in layers},
        "what comes after the layers": Segment(last=True),
    }
