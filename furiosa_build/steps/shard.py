"""partition:weights: the parameters of every rank of every stage, as the files the runtime maps.

Where there is one rank and one stage, the files that `quantize` wrote are the parameter files, by hard link. Those of
someone else's checkpoint are copied: they may change, and their scales may have another dtype.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from furiosa_build.core.files import link_or_copy
from furiosa_build.core.progress import expect
from furiosa_build.ir.outline import ParameterOutline
from furiosa_build.steps.base import Inputs, Step
from furiosa_build.steps.weights import LARGEST_FILE, WeightsRequest, open_weights, weight_files

if TYPE_CHECKING:
    from torch import Tensor

    from furiosa_build.ir.tensors import Layout
    from furiosa_build.weights.source import TensorSource


class Shard(Step[WeightsRequest]):
    """Writes or links `stage-S-rank-R-*.safetensors`. The inputs are the checkpoint."""

    name = "shard"
    Request = WeightsRequest

    def run(self, request: WeightsRequest, inputs: Inputs, output: Path) -> dict[str, str]:
        if not request.schemes or request.taken or request.ranks > 1 or len(request.stages) > 1:
            return _write(request, inputs, output)
        checkpoint = weight_files(inputs.files)
        names = dict(zip(checkpoint, _file_names(len(checkpoint)), strict=True))
        for name, path in checkpoint.items():
            link_or_copy(path, output / names[name])
        return {names[name]: request.inputs[name] for name in checkpoint}


def _write(request: WeightsRequest, inputs: Inputs, output: Path) -> dict[str, str]:
    from furiosa_build.weights.safetensors_writer import SafetensorsWriter, split_into_files

    outline, ranks, stages, schemes = request.outline, request.ranks, request.stages, request.schemes
    source = open_weights(request, inputs.files)
    planned = []
    for stage in range(len(stages)):
        for rank in range(ranks):
            shares = [
                _Share(name, outline.parameters[name], schemes.get(name, "none"), ranks, rank)
                for name in outline.stage_parameters(stages, stage)
            ]
            owner = {stored: share for share in shares for stored in share.layouts}
            files = split_into_files((share.layouts for share in shares), LARGEST_FILE)
            planned += [
                (name, layouts, owner)
                for name, layouts in zip(_file_names(len(files), stage, rank), files, strict=True)
            ]
    expect(sum(layout.nbytes for _, layouts, _ in planned for layout in layouts.values()))
    digests = {}
    for name, layouts, owner in planned:
        with SafetensorsWriter(output / name, layouts) as writer:
            for tensor in writer.order:
                writer.write(tensor, owner[tensor].of(tensor, source))
        digests[name] = writer.sha256
    return digests


class _Share:
    """A rank's share of a parameter, as the tensors that are stored for it."""

    def __init__(self, name: str, parameter: ParameterOutline, scheme: str, ranks: int, rank: int) -> None:
        from furiosa_build.ir.tensors import Layout
        from furiosa_build.quant.quantization import stored_layouts

        whole = parameter.layout
        self._cut = parameter.cut if ranks > 1 else None
        self._rank = rank
        self._shape = list(whole.shape) if self._cut is None else self._cut.local_shape(parameter.shape, ranks)
        if self._cut is not None:
            self._begin, self._length = self._cut.share(parameter.shape, ranks, rank)
        self.layouts: dict[str, Layout] = stored_layouts(name, Layout(whole.dtype, tuple(self._shape)), scheme)

    def of(self, stored: str, source: TensorSource) -> Tensor:
        """The share of one stored tensor."""
        import torch

        if stored.endswith(".weight_shape"):
            return torch.tensor(self._shape)
        tensor, layout = source.read(stored), self.layouts[stored]
        if stored.endswith(".weight_scale"):
            tensor = tensor.reshape(-1, *layout.shape[1:])
        if self._cut is None:
            pass
        elif self._cut.how == "once":
            tensor = tensor if self._rank == 0 else torch.zeros_like(tensor)
        elif self._cut.dim == 1 and stored.endswith(".weight_packed"):
            tensor = _repack(tensor, self._begin, self._length)
        elif tensor.shape == layout.shape:
            pass  # all ranks have it: such as one scale for the weight, or one for each of its whole rows
        elif self._cut.dim == 0:
            tensor = tensor[self._begin : self._begin + self._length]
        else:
            tensor = tensor[:, self._begin : self._begin + self._length]
        return tensor.to(getattr(torch, layout.dtype))


def _repack(packed: Tensor, begin: int, length: int) -> Tensor:
    """Columns of int8 weights, packed by four into int32, as a matrix of their own."""
    import torch

    from furiosa_build.quant.linear import packed_columns

    own = torch.zeros((packed.shape[0], packed_columns(length)), dtype=torch.uint8)
    own[:, :length] = packed.view(torch.uint8)[:, begin : begin + length]
    return own.view(torch.int32)


def _file_names(count: int, stage: int = 0, rank: int = 0) -> list[str]:
    return [f"stage-{stage}-rank-{rank}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
