"""qualify: does the artifact generate what the model says? Only then does `latest` point to it.

The artifact runs in a fresh process with the runtime alone. The reference shares no code with it: transformers' own
modules and attention, eager, over the dequantized checkpoint, one layer in memory at a time.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.artifact.schema import MANIFEST_FILE, TIMESTAMP_FILE, Manifest, Timestamp, to_json
from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.core.errors import StepError
from furiosa_build.core.files import link_or_copy
from furiosa_build.core.progress import advance, expect
from furiosa_build.ir.outline import Outline
from furiosa_build.quant.scheme import QuantScheme, scheme
from furiosa_build.steps.base import BuildState, Entry, Inputs, Likeness, Step, Work
from furiosa_build.steps.weights import (
    CHECKPOINT,
    SOURCE,
    WeightsRequest,
    open_weights,
    parameters_of,
    scheme_of,
    size_of,
    weights_request,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from furiosa_build.plan.budget.costs import Costs
    from furiosa_build.plan.budget.durations import KnownStep
    from furiosa_build.plan.planner import PlannedStep, Site
    from furiosa_build.weights.source import TensorSource

OUTPUT = "qualification.json"
PROBED = "probed.safetensors"
ARTIFACT = "artifact/"
WEIGHTS = "weights/"
"""What the names of the inputs begin with: the artifact's files and the checkpoint's."""

_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference of a logit, as a share of the largest logit. Both sides round to the model's dtype after every
operation, in another order: 8 bits of mantissa through some tens of operations a layer."""


class Qualify(Step[WeightsRequest]):
    """Writes qualification.json.

    Raises StepError when the artifact does not run, RuntimeError when it says something else than the model.
    """

    name = label = "qualify"
    Request = WeightsRequest
    scope = "artifact"
    alone = True
    packages = ("torch", "transformers", "numpy", "tokenizers")
    modules = ("furiosa_build.runtime.probe",)
    backend_code = uses_schemes = True

    def plan(self, site: Site) -> Entry:
        model, written = site.model, site.model.writes_checkpoint
        # The artifact's id, which artifact.json has, stands for all files but provenance.json.
        artifact = {"package": "artifact.json"}
        return Entry(
            self.name,
            "load the artifact in a fresh process, generate, compare with the eager reference",
            needs=artifact | ({site.maker("checkpoint"): CHECKPOINT} if written else {"fetch": SOURCE}),
            reads={
                "schemes": dict(model.schemes),
                "parameters": parameters_of(model),
                "hf_config": dict(model.hf_config),
            },
        )

    def request(self, step: PlannedStep, state: BuildState) -> WeightsRequest:
        weights = weights_request(step, state)
        inputs = {f"{WEIGHTS}{name}": sha256 for name, sha256 in weights.inputs.items()}
        manifest = Manifest.model_validate(state.json("package", MANIFEST_FILE))
        inputs |= {f"{ARTIFACT}{name}": file.sha256 for name, file in manifest.files.items()}
        inputs[f"{ARTIFACT}{MANIFEST_FILE}"] = state.files("package")[MANIFEST_FILE].sha256
        return weights.model_copy(update={"inputs": inputs})

    def work(self, step: PlannedStep, costs: Costs) -> Work:
        sizes = costs.of(step)
        return Work(costs.files + (sizes.files if step.model.schemes else sizes.weights))

    def held(self, step: PlannedStep, costs: Costs) -> int:
        sizes = costs.of(step)
        return max(sizes.probe, sizes.reference)

    def likeness(self, step: KnownStep) -> Likeness:
        artifact, schemes = step.needs["package"], scheme_of(step.reads)
        drawn = step.is_drawn and schemes == "none"
        return Likeness((artifact["backend"]["name"], schemes, drawn), size_of(artifact["outline"]["parameters"]))

    def run(self, request: WeightsRequest, inputs: Inputs, output: Path) -> None:
        artifact = output / "artifact"
        assemble(inputs.under(ARTIFACT), artifact)
        probed = generate(artifact, output)
        shutil.rmtree(artifact)
        compare(probed, request, inputs.under(WEIGHTS), output)
        probed.unlink()


def assemble(files: Mapping[str, Path], artifact: Path) -> None:
    """Makes an artifact's directory of its files."""
    for name, path in files.items():
        link_or_copy(path, artifact / name)
    manifest = Manifest.model_validate_json(files[MANIFEST_FILE].read_bytes())
    (artifact / TIMESTAMP_FILE).write_bytes(to_json(Timestamp.of(manifest.artifact_id, 0)))


def generate(artifact: Path, output: Path) -> Path:
    """Runs the artifact in a fresh process; returns the file with what it generated. Raises StepError if it fails."""
    probed = output / PROBED
    command = [sys.executable, "-m", "furiosa_build.runtime.probe", str(artifact), str(probed)]
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise StepError("qualify", f"the artifact does not run (exit status {code})")
    return probed


def compare(generated: Path, request: WeightsRequest, weights: Mapping[str, Path], output: Path) -> None:
    """Compares what `generate` returned with the reference, and writes qualification.json."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    probed = load_file(generated)
    with safe_open(generated, "pt") as file:
        told = file.metadata() or {}
    source = open_weights(request, weights)
    reference = _Reference(request.hf_config, request.outline, request.schemes, source)

    names = sorted(key.removeprefix("tokens.") for key in probed if key.startswith("tokens."))
    expected_logits = reference.logits([probed[f"tokens.{name}"][:-1] for name in names])
    tokens = agreeing = 0
    worst = largest = regret = noise = 0.0
    for name, (rows, unrounded) in zip(names, expected_logits, strict=True):
        logits = probed[f"logits.{name}"]
        noise = max(noise, float((rows - unrounded)[-len(logits) :].abs().max()))
        expected, chosen = rows[-len(logits) :], probed[f"tokens.{name}"][-len(logits) :]
        if not (logits.isfinite().all() and expected.isfinite().all()):  # no comparison would find that
            raise RuntimeError(
                "logits are not finite: the artifact's, or those of the reference (are the weights sound?)"
            )
        tokens += len(chosen)
        agreeing += int((expected.argmax(-1) == chosen).sum())
        worst = max(worst, float((logits - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
        regret = max(regret, float((expected.amax(-1) - expected.gather(-1, chosen[:, None])[:, 0]).max()))
    # Of an activation that lies between two steps chance decides, here as there: as much as rounding it does at all.
    allowed = _TOLERANCE[reference.dtype] * max(largest, 1.0) + noise
    figures = {
        "tokens": tokens,
        "top1_agreement": agreeing / tokens,
        "largest_logit_difference": worst,
        "allowed_logit_difference": allowed,
        "largest_logit": largest,
        **{name: float(figure) for name, figure in told.items()},
    }
    (output / OUTPUT).write_bytes(canonical_json(figures))
    # A choice between near-equal logits may fall either way; one that costs more than rounding explains may not.
    if not worst <= allowed or not regret <= 2 * allowed:
        raise RuntimeError(f"the artifact's logits are not the model's: {figures}")


class _Reference:
    """The model's logits by transformers, a layer at a time."""

    def __init__(
        self, hf_config: dict[str, Any], outline: Outline, schemes: dict[str, Any], source: TensorSource
    ) -> None:
        from furiosa_build.models.skeleton import Skeleton

        self._skeleton = Skeleton(hf_config, attention="eager")
        self._outline, self._schemes, self._source = outline, schemes, source
        self.dtype = outline.dtype
        self._rounds = False
        for name, module in self._skeleton.model.named_modules():
            own = scheme(schemes.get(f"{name}.weight", "none"))
            if own.rounds_activations:
                module.register_forward_pre_hook(_round_half_of_input(own))
                self._rounds = True

    def logits(self, sequences: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Sequences of token ids, int64 [tokens] -> for each float32 [tokens, vocab], as it is and as if no layer
        rounded its input.

        All in one pass, so that every layer is read once; what is padded comes last, where no token attends to it.
        """
        import torch

        from furiosa_build.models.skeleton import functional

        skeleton = self._skeleton
        expect(
            sum(
                scheme(self._schemes.get(name, "none")).nbytes(parameter.layout)
                for name, parameter in self._outline.parameters.items()
            )
        )
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).repeat(2 if self._rounds else 1, 1)
        outer = {name: self._read(name) for name in skeleton.outer_parameters()}
        layers = [self._streamed(layer) for layer in range(len(skeleton.layers))]
        with torch.no_grad():
            logits = functional(outer, skeleton.model, lambda: skeleton.forward_with(layers, ids))
        unrounded = logits[-len(sequences) :]
        return [
            (row[: len(sequence)].float(), other[: len(sequence)].float())
            for row, other, sequence in zip(logits, unrounded, sequences, strict=False)
        ]

    def _streamed(self, layer: int) -> nn.Module:
        from torch import nn

        from furiosa_build.models.skeleton import functional

        module, prefix = self._skeleton.layers[layer], self._skeleton.layer_prefix(layer)

        class Streamed(nn.Module):
            def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
                parameters = {name: read(prefix + name) for name, _ in module.named_parameters()}
                return functional(parameters, module, lambda: module(hidden_states, **kwargs))

            def __init__(self) -> None:
                super().__init__()
                self.attention_type = getattr(module, "attention_type", None)

        read = self._read
        return Streamed()

    def _read(self, name: str) -> Tensor:
        import torch

        own, layout = scheme(self._schemes.get(name, "none")), self._outline.parameters[name].layout
        advance(own.nbytes(layout))
        stored = {part: self._source.read(own.stored_name(name, part)) for part in own.parts(layout)}
        return own.dequantize(stored, getattr(torch, layout.dtype))


def _round_half_of_input(own: QuantScheme) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that rounds the first half of a layer's input, token by token."""
    import torch

    def round_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        x, unrounded = inputs[0].chunk(2)
        return (torch.cat([own.round(x, x.abs().amax(dim=-1, keepdim=True)), unrounded]),)

    return round_input
