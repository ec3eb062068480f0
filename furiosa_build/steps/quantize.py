"""quantize: a standard compressed-tensors checkpoint, tensor by tensor from the mapped source to the written file.

Weights that are taken as they are, quantized or not, are only checked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.core.progress import expect
from furiosa_build.ir.outline import Outline
from furiosa_build.quant.compressed_tensors import quantization_config
from furiosa_build.quant.scheme import scheme
from furiosa_build.steps.base import Entry, Inputs, Likeness, Made, Step, Work
from furiosa_build.steps.weights import (
    LARGEST_FILE,
    SOURCE,
    WeightsRequest,
    described,
    open_weights,
    parameters_of,
    scheme_of,
    size_of,
    weights_request,
)
from furiosa_build.weights.hf_layout import INDEX_FILE

if TYPE_CHECKING:
    from furiosa_build.plan.budget.costs import Costs
    from furiosa_build.plan.budget.durations import KnownStep
    from furiosa_build.plan.model import ModelPlan
    from furiosa_build.plan.planner import PlannedStep, Site

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
                "parameters": parameters_of(model),
                "architecture": model.outline.architecture,
                "hf_config": dict(model.hf_config),
            },
        )

    def request(self, step: PlannedStep, made: Made) -> WeightsRequest:
        return weights_request(step, made, of_checkpoint=False)

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
    import torch

    from furiosa_build.weights.checkpoint import check_parameters, check_stored
    from furiosa_build.weights.safetensors_writer import SafetensorsWriter, file_names, split_into_files

    outline, schemes, config = request.outline, request.schemes, dict(request.hf_config)
    source = open_weights(request, inputs.files)
    if request.taken:
        check_stored(source, outline, schemes, described(inputs.files))
        (output / CONFIG).write_bytes(canonical_json(config))
        return {}
    check_parameters(source, outline.parameters, described(inputs.files))
    if not schemes:
        (output / CONFIG).write_bytes(canonical_json(config))
        return {}

    found = {name: scheme(schemes.get(name, "none")) for name in outline.parameters}
    groups = [found[name].layouts(name, parameter.layout) for name, parameter in outline.parameters.items()]
    files = split_into_files(groups, LARGEST_FILE)
    origin = {
        found[name].stored_name(name, part): (name, part)
        for name, parameter in outline.parameters.items()
        for part in found[name].parts(parameter.layout)
    }
    names, digests = file_names(len(files)), {}
    expect(sum(layout.nbytes for stored in files for layout in stored.values()))
    for file, stored in zip(names, files, strict=True):
        with SafetensorsWriter(output / file, stored) as writer:
            at_hand, parts = "", dict[str, Any]()
            for tensor in writer.order:
                name, part = origin[tensor]
                parameter = outline.parameters[name]
                # Only the parts of the matrix at hand are kept. They stand side by side but for those that follow from
                # its shape: small, they come last, and kept from every matrix they would scatter the heap.
                if (derived := found[name].derived(part, parameter.layout)) is not None:
                    writer.write(tensor, derived)
                    continue
                if name != at_hand:
                    at_hand, parts = name, {}
                    parts = found[name].quantize(source.read(name).to(getattr(torch, parameter.dtype)))
                writer.write(tensor, parts[part])
        digests[file] = writer.sha256
    if len(files) > 1:
        index = {
            "metadata": {},
            "weight_map": {t: f for f, group in zip(names, files, strict=True) for t in group},
        }
        (output / INDEX_FILE).write_text(json.dumps(index, indent=1, sort_keys=True))
    ignored = sorted(n.removesuffix(".weight") for n, p in outline.parameters.items() if p.linear and n not in schemes)
    quantized = {name.removesuffix(".weight"): text for name, text in schemes.items()}
    config["quantization_config"] = quantization_config(quantized, [*ignored, *_tied_head(outline)])
    (output / CONFIG).write_text(
        json.dumps({"architectures": [outline.architecture], **config}, indent=2, sort_keys=True)
    )
    return digests


def _tied_head(outline: Outline) -> list[str]:
    """A head that is tied to the embedding is a linear layer to transformers, and must be left alone."""
    return [] if "lm_head.weight" in outline.parameters else ["lm_head"]
