"""quantize: a standard compressed-tensors checkpoint, tensor by tensor from the mapped source to the written file.

Weights that are taken as they are, quantized or not, are only checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.core.progress import expect
from furiosa_build.ir.outline import Outline
from furiosa_build.quant.scheme import QuantScheme, scheme
from furiosa_build.steps.base import BuildState, Entry, Inputs, Likeness, Step, Work
from furiosa_build.steps.weights import (
    LARGEST_FILE,
    SOURCE,
    WeightsRequest,
    conversion_of,
    described,
    open_weights,
    parameters_of,
    scheme_of,
    size_of,
    weights_request,
)
from furiosa_build.weights.hf_layout import INDEX_FILE

if TYPE_CHECKING:
    from torch import Tensor

    from furiosa_build.ir.tensors import Layout
    from furiosa_build.plan.budget.costs import Costs
    from furiosa_build.plan.budget.durations import KnownStep
    from furiosa_build.plan.model import ModelPlan
    from furiosa_build.plan.planner import PlannedStep, Site
    from furiosa_build.weights.source import TensorSource

CONFIG = "config.json"


class Quantize(Step[WeightsRequest]):
    """Writes the checkpoint of the source, which its inputs are.

    When there is nothing to quantize only config.json is written: the source is the checkpoint.
    """

    name = label = "quantize"
    Request = WeightsRequest
    makes = "checkpoint"
    packages = ("torch", "numpy")
    uses_schemes = True

    def plan(self, site: Site) -> Entry:
        model = site.model
        return Entry(
            self.name,
            _description(model),
            needs={site.name_of("fetch"): SOURCE},
            reads={
                "schemes": dict(model.schemes),
                **({"taken": True} if model.taken else {}),
                **conversion_of(model),
                "parameters": parameters_of(model),
                "architecture": model.outline.architecture,
                "hf_config": dict(model.hf_config),
            },
        )

    def request(self, step: PlannedStep, state: BuildState) -> WeightsRequest:
        return weights_request(step, state, of_checkpoint=False)

    def work(self, step: PlannedStep, costs: Costs) -> Work:
        sizes = costs.of(step)
        return Work(sizes.weights, sizes.files) if step.model.writes_checkpoint else Work()

    def held(self, step: PlannedStep, costs: Costs) -> int:
        return costs.of(step).largest_weight if step.model.writes_checkpoint else 0

    def likeness(self, step: KnownStep) -> Likeness:
        schemes = scheme_of(step.reads)
        if schemes == "none" or "taken" in step.reads:  # it looks at the weights' shapes
            return Likeness(("none",))
        return Likeness((schemes, step.is_drawn), size_of(step.reads["parameters"]))

    def run(self, request: WeightsRequest, inputs: Inputs, output: Path) -> dict[str, str]:
        return _write(request, inputs, output)


def _description(model: ModelPlan) -> str:
    if model.taken:
        return f"{model.checkpoint_name} is quantized: check its {len(model.schemes)} {model.quantization} weights"
    if not model.schemes:
        return "no quantization: check the weights"
    return f"quantize {len(model.schemes)} weights to {model.quantization}"


def _write(request: WeightsRequest, inputs: Inputs, output: Path) -> dict[str, str]:
    from furiosa_build.weights.checkpoint import check_parameters, check_stored

    outline, schemes, config = request.outline, request.schemes, dict(request.hf_config)
    source = open_weights(request, inputs.files)
    if request.taken:
        check_stored(source, outline, schemes, described(inputs.files))
    else:
        check_parameters(source, outline.parameters, described(inputs.files))
    if request.taken or not schemes:
        (output / CONFIG).write_bytes(canonical_json(config))
        return {}
    from furiosa_build.quant.compressed_tensors import quantization_config

    digests = _write_weights(outline, schemes, source, output)
    ignored = sorted(n.removesuffix(".weight") for n, p in outline.parameters.items() if p.linear and n not in schemes)
    linear, embeddings = dict[str, str](), dict[str, str]()
    for name, text in schemes.items():
        (linear if outline.parameters[name].linear else embeddings)[name.removesuffix(".weight")] = text
    config["quantization_config"] = quantization_config(linear, [*ignored, *_tied_head(outline)], embeddings)
    (output / CONFIG).write_text(
        json.dumps({"architectures": [outline.architecture], **config}, indent=2, sort_keys=True)
    )
    return digests


def _write_weights(outline: Outline, schemes: Mapping[str, str], source: TensorSource, output: Path) -> dict[str, str]:
    """Quantizes parameter by parameter into the files of a checkpoint; returns their sha256."""
    from furiosa_build.weights.safetensors_writer import SafetensorsWriter, file_names, split_into_files

    found = {name: scheme(schemes.get(name, "none")) for name in outline.parameters}
    parameters = {name: parameter.layout for name, parameter in outline.parameters.items()}
    files = split_into_files((found[name].layouts(name, layout) for name, layout in parameters.items()), LARGEST_FILE)
    origin = {
        found[name].stored_name(name, part): (name, part)
        for name, layout in parameters.items()
        for part in found[name].parts(layout)
    }
    names, digests = file_names(len(files)), {}
    expect(sum(layout.nbytes for stored in files for layout in stored.values()))
    for file, stored in zip(names, files, strict=True):
        with SafetensorsWriter(output / file, stored) as writer:
            at_hand, parts = "", dict[str, Any]()
            for tensor in writer.order:
                name, part = origin[tensor]
                # Only the parts of the matrix at hand are kept. They stand side by side but for those that follow from
                # its shape: small, they come last, and kept from every matrix they would scatter the heap.
                if (derived := found[name].derived(part, parameters[name])) is not None:
                    writer.write(tensor, derived)
                    continue
                if name != at_hand:
                    at_hand, parts = name, {}
                    parts = _quantized(found[name], name, source.read(name), parameters[name])
                writer.write(tensor, parts[part])
        digests[file] = writer.sha256
    if len(files) > 1:
        weight_map = {tensor: file for file, stored in zip(names, files, strict=True) for tensor in stored}
        (output / INDEX_FILE).write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1, sort_keys=True)
        )
    return digests


def _quantized(own: QuantScheme, name: str, weight: Tensor, layout: Layout) -> dict[str, Tensor]:
    import torch

    from furiosa_build.weights.cast import cast

    return own.quantize(cast(name, weight, getattr(torch, layout.dtype)))


def _tied_head(outline: Outline) -> list[str]:
    """A head that is tied to the embedding is a linear layer to transformers, and must be left alone."""
    return [] if "lm_head.weight" in outline.parameters else ["lm_head"]
