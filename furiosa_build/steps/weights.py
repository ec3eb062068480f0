"""What the steps that read weights share. Here, so that an edit of one of them does not make the others run again."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from furiosa_build.ir.outline import Outline, ParameterOutline
from furiosa_build.quant.scheme import scheme, summary
from furiosa_build.steps.base import BuildState, Request
from furiosa_build.weights import listing

if TYPE_CHECKING:
    from furiosa_build.plan.model import ModelPlan
    from furiosa_build.plan.planner import PlannedStep
    from furiosa_build.weights.source import TensorSource

File = TypeVar("File")

LARGEST_FILE = 4 << 30
"""Bytes in one file of parameters."""

SOURCE, CHECKPOINT = listing.WEIGHTS, "*.safetensors"
"""What steps take of `fetch` and of the step that makes the checkpoint. What else these write, such as a tokenizer's
files, does not make them run again."""


class WeightsRequest(Request):
    """A step that reads weights: its inputs are their files, those of the source or those of the checkpoint.

    Attributes:
        outline: The model.
        hf_config: The fields of its config.json.
        schemes: The scheme of each quantized parameter, by name.
        seed: Draw the weights from this seed, and read no file.
        taken: The source is a quantized checkpoint, which is taken as it is.
        stored_as: As in Loading: how transformers would read what is stored, if it has to be converted.
        ranks: Ranks of a stage.
        stages: The layers of each stage.
    """

    outline: Outline
    hf_config: dict[str, Any]
    schemes: dict[str, str]
    seed: int | None = None
    taken: bool = False
    stored_as: dict[str, Any] | None = None
    ranks: int
    stages: list[list[int]]


def weights_request(step: PlannedStep, state: BuildState, of_checkpoint: bool = True) -> WeightsRequest:
    """The request of a step that reads weights: those of the checkpoint, if there is one, or those of the source."""
    model, site = step.model, step.site
    written = of_checkpoint and model.writes_checkpoint
    source = listing.ListedWeights.model_validate(state.json(site.name_of("fetch"), listing.WEIGHTS))
    files = state.files(checkpoint_of(step)) if written else source.files
    return WeightsRequest(
        inputs={name: file.sha256 for name, file in weight_files(files).items()},
        outline=model.outline,
        hf_config=dict(model.hf_config),
        schemes=dict(model.schemes),
        seed=None if written else source.seed,
        taken=model.taken,
        stored_as=None if written or model.stored_as is None else dict(model.stored_as),
        ranks=model.ranks,
        stages=model.stages,
    )


def checkpoint_of(step: PlannedStep) -> str:
    """The step whose checkpoint a step takes: the one that it needs of those that make one."""
    [maker] = [name for name in step.needs if step.site.before[name].type.makes == "checkpoint"]
    return maker


def parameters_of(model: ModelPlan) -> dict[str, Any]:
    """The model's parameters as plain data, for keys."""
    return {name: parameter.model_dump() for name, parameter in model.outline.parameters.items()}


def conversion_of(model: ModelPlan) -> dict[str, Any]:
    """What shapes the weights that are read where transformers converts them, for keys."""
    if model.stored_as is None:
        return {}
    return {"converted_by": {"transformers": version("transformers"), "stored_as": dict(model.stored_as)}}


def size_of(parameters: Mapping[str, Any]) -> int:
    """Bytes of such parameters before they are quantized."""
    return sum(ParameterOutline.model_validate(parameter).layout.nbytes for parameter in parameters.values())


def scheme_of(reads: Mapping[str, Any]) -> str:
    """The schemes that a step's quantized parameters have, by what it reads; `none` if there are no such."""
    return summary(reads.get("schemes", {}).values())


def weight_files(files: Mapping[str, File]) -> dict[str, File]:
    """The files that hold weights, in whatever format: configs and indices are JSON."""
    return {name: path for name, path in sorted(files.items()) if not name.endswith(".json")}


def open_weights(request: WeightsRequest, files: Mapping[str, Path]) -> TensorSource:
    """The weights of a request, whose inputs are `files`."""
    from furiosa_build.weights.formats import open_weight_files
    from furiosa_build.weights.random import RandomSource

    if request.seed is not None:
        return RandomSource(request.outline.parameters, request.seed)
    source = open_weight_files(list(weight_files(files).values()))
    if request.stored_as is None:
        return source
    from furiosa_build.weights.converted import Converted

    quantized = request.schemes.items() if request.taken else ()
    layouts = {name: parameter.layout for name, parameter in request.outline.parameters.items()}
    parts = frozenset(stored for name, text in quantized for stored in scheme(text).layouts(name, layouts[name]))
    return Converted(source, request.hf_config, request.stored_as, parts)


def described(files: Mapping[str, Path]) -> str:
    """Where weights come from, for messages: their directory, or the one file that is called otherwise."""
    for name, path in weight_files(files).items():
        return str(path.parent if path.name == name else path)
    return "random weights"
