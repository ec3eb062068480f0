"""Finds the outline of a model. Layers are of one kind when they trace to the same graph.

An outline is a fact about a config.json and a version of transformers: found once, in a second or two, and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from furiosa_build.backends.graph import dtype_name
from furiosa_build.ir.outline import KindOutline, Outline, ParameterOutline
from furiosa_build.ir.segment import Segment
from furiosa_build.models.checks import check_model
from furiosa_build.models.refusals import failures_of
from furiosa_build.models.skeleton import Skeleton, structure
from furiosa_build.models.tensor_parallel import parameter_cuts
from furiosa_build.models.tracing import BucketShape, Tracer, activation_name

_SHORT = BucketShape(1, 8, 8)


def survey(hf_config: Mapping[str, Any]) -> Outline:
    """Finds the outline of the model that `hf_config` (the fields of its config.json) describes.

    Raises UserError when the architecture cannot be built.
    """
    tracer = Tracer(hf_config, {})
    with failures_of(tracer.skeleton.model):
        check_model(tracer.skeleton)
        return _outline(tracer)


def _outline(tracer: Tracer) -> Outline:
    skeleton = tracer.skeleton
    sources = _tensor_sources(tracer)
    blocks = _group_layers(tracer, sources)

    needed = {(int(layer), name) for block in blocks for layer, name in map(_split_activation, block.inputs.values())}
    first_outputs = sorted(needed)
    first = tracer.trace(_SHORT, Segment(first=True, outputs=tuple(first_outputs))).whole
    last = tracer.trace(_SHORT, Segment(last=True)).whole
    outer = {spec.name for graph in (first, last) for spec in graph.inputs if spec.role == "parameter"}
    inner = {f"{skeleton.layer_prefix(layer)}{name}" for b in blocks for layer in b.layers for name in b.parameters}
    return Outline(
        architecture=type(skeleton.model).__name__,
        dtype=dtype_name(skeleton.dtype),
        vocab_size=skeleton.vocab_size,
        layer_prefix=skeleton.layer_prefix(0).removesuffix("0."),
        blocks=blocks,
        first_outputs=first_outputs,
        first_signature=_digest(first.to_json()),
        first_parameters=[spec.name for spec in first.inputs if spec.role == "parameter"],
        last_signature=_digest(last.to_json()),
        last_parameters=[spec.name for spec in last.inputs if spec.role == "parameter"],
        parameters=_parameters(skeleton, outer | inner),
        rotary_limit=skeleton.rotary_limit,
        head=_head(skeleton),
    )


def _tensor_sources(tracer: Tracer) -> list[dict[str, str]]:
    """The tensors that each layer is passed: argument -> pipeline tensor. Layers that share a tensor share its name."""
    calls = tracer.layer_calls(_SHORT)
    names: dict[int, str] = {}
    return [
        {name: names.setdefault(id(tensor), activation_name(layer, name)) for name, tensor in call.tensors.items()}
        for layer, call in enumerate(calls)
    ]


def _split_activation(name: str) -> tuple[str, str]:
    layer, _, argument = name.removeprefix("layers.").partition(".")
    return layer, argument


def _group_layers(tracer: Tracer, sources: list[dict[str, str]]) -> list[KindOutline]:
    groups: dict[tuple[str, ...], KindOutline] = {}
    traced: dict[str, tuple[str, list[str], list[str], tuple[list[int], list[int]]]] = {}
    for layer, module in enumerate(tracer.skeleton.layers):
        shown = f"{structure(module)}{sorted(sources[layer].items())}"
        if shown not in traced:
            segment = Segment(layers=(layer,))
            # Longer than any window, so that a window shows in the trace. Tracing holds no memory.
            long = tracer.skeleton.longest if tracer.skeleton.has_own_attention else 2**20
            prefill = tracer.trace(BucketShape(1, long, long), segment).whole
            decode = tracer.trace(BucketShape(2, 1, long), segment).whole
            arguments = [spec.name for spec in decode.inputs if spec.role == "activation"]
            parameters = [spec.name for spec in decode.inputs if spec.role == "parameter"]
            keys, values = (
                [int(size or 0) for size in spec.shape[1:]] for spec in decode.inputs if spec.role == "kv_cache"
            )
            signature = _digest(prefill.to_json() + decode.to_json())
            traced[shown] = (
                signature,
                arguments,
                parameters,
                (keys, values),
            )
        signature, arguments, parameters, (keys, values) = traced[shown]
        inputs = {name: source for name, source in sources[layer].items() if name in arguments}
        key = (signature, *sorted(inputs.values()))
        kind = groups.get(key)
        groups[key] = KindOutline(
            layers=[*(kind.layers if kind else []), layer],
            signature=signature,
            inputs=inputs,
            parameters=parameters,
            cache_shape=keys,
            value_size=None if values == keys else values[1],
        )
    return list(groups.values())


def _parameters(skeleton: Skeleton, names: set[str]) -> dict[str, ParameterOutline]:
    model, cuts = skeleton.model, parameter_cuts(skeleton)
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        name: ParameterOutline(
            dtype=dtype_name(p.dtype), shape=list(p.shape), linear=name in linears, cut=cuts.get(name)
        )
        for name, p in sorted(model.named_parameters())
        if name in names
    }


def _head(skeleton: Skeleton) -> str | None:
    """The name of the head's weight, if all modules that have it are of kinds whose arithmetic is known."""
    head = skeleton.model.get_output_embeddings()
    if head is None:
        return None
    own = [module for module in skeleton.model.modules() if module._parameters.get("weight") is head.weight]
    if not own or any(type(module) not in (nn.Linear, nn.Embedding) for module in own):
        return None
    [found] = [name for name, parameter in skeleton.model.named_parameters() if parameter is head.weight]
    return str(found)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
