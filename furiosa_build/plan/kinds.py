"""How the forward pass is divided into supertasks, and which of them share a program.

use_blockwise_compile   first | num_blocks_per_supertask layers | ... | last
without it              a stage in one piece: with what comes before its layers, or after them, if it is at an end
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from furiosa_build.ir.outline import KindOutline, Outline
from furiosa_build.ir.segment import Segment
from furiosa_build.recipe.schema import RewritingSpec


@dataclass(frozen=True)
class Block:
    """A layer as its program sees it. `schemes` has its quantized parameters, by their names in the layer."""

    outline: KindOutline
    schemes: Mapping[str, str]


@dataclass(frozen=True)
class Use:
    """A supertask: number `number` of its pipeline, run on `stage`, for `layers`."""

    number: int
    stage: int
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Kind:
    """Supertasks that share a program.

    Attributes:
        name: Such as `first`, `block` or `last`.
        segment: What the first of them computes; the others do the same for their own layers.
        uses: Where they are in a pipeline.
        blocks: The layers of a supertask.
        schemes: The quantized parameters outside of the layers, by name.
        sources: Input of the program -> tensor of the pipeline, for what its layers are called with.
    """

    name: str
    segment: Segment
    uses: tuple[Use, ...]
    blocks: tuple[Block, ...] = ()
    schemes: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of all its supertasks."""
        return tuple(layer for use in self.uses for layer in use.layers)


def find_kinds(
    outline: Outline,
    schemes: Mapping[str, str],
    stages: Sequence[Sequence[int]],
    rewriting: RewritingSpec,
    slices: bool,
) -> tuple[Kind, ...]:
    """The kinds of supertask of a bucket, in the order in which they first run.

    Args:
        outline: The model's.
        schemes: Full parameter name -> scheme, of quantized parameters.
        stages: The layers of each.
        rewriting: How the model is divided.
        slices: Whether the last layer ends with the last token of each prompt.
    """
    found: dict[object, list[tuple[Use, Segment]]] = {}
    blocks = _blocks(outline, schemes)
    for number, (stage, segment) in enumerate(_segments(stages, rewriting, slices)):
        of_layers = [blocks[layer] for layer in segment.layers]
        likeness = (segment.first, segment.last, segment.slices, segment.is_sliced, repr(of_layers))
        # Constants in a program are those of one supertask.
        key = number if rewriting.embed_all_constants_into_graph else likeness
        found.setdefault(key, []).append((Use(number, stage, segment.layers), segment))
    names = _names([group[0][1] for group in found.values()], rewriting)
    kinds = []
    for name, group in zip(names, found.values(), strict=True):
        segment = group[0][1]
        own = tuple(blocks[layer] for layer in segment.layers)
        arguments, sources = _arguments(own)
        outputs = tuple(outline.first_outputs) if segment.first and not segment.last else ()
        kinds.append(
            Kind(
                name,
                segment.model_copy(update={"arguments": arguments, "outputs": outputs}),
                uses=tuple(use for use, _ in group),
                blocks=own,
                schemes={name: schemes[name] for name in outer_parameters(segment, outline) if name in schemes},
                sources={} if segment.first else sources,
            )
        )
    return tuple(kinds)


def outer_parameters(segment: Segment, outline: Outline) -> list[str]:
    """The parameters outside of the layers that a segment reads."""
    first, last = outline.first_parameters, outline.last_parameters
    return [*(first if segment.first else ()), *(last if segment.last else ())]


def _segments(stages: Sequence[Sequence[int]], rewriting: RewritingSpec, slices: bool) -> Iterator[tuple[int, Segment]]:
    """Every supertask of a pipeline with its stage, in order."""
    end = len(stages) - 1
    for stage, layers in enumerate(stages):
        if not rewriting.use_blockwise_compile:
            last = stage == end
            yield stage, Segment(first=stage == 0, layers=tuple(layers), last=last, slices=slices and last)
            continue
        if stage == 0:
            yield stage, Segment(first=True)
        size = rewriting.num_blocks_per_supertask
        for begin in range(0, len(layers), size):
            own = tuple(layers[begin : begin + size])
            yield stage, Segment(layers=own, slices=slices and stage == end and own[-1] == layers[-1])
        if stage == end:
            yield stage, Segment(last=True, is_sliced=slices)


def _blocks(outline: Outline, schemes: Mapping[str, str]) -> dict[int, Block]:
    blocks = {}
    for kind in outline.blocks:
        for layer in kind.layers:
            prefix = f"{outline.layer_prefix}{layer}."
            quantized = {name: schemes[prefix + name] for name in kind.parameters if prefix + name in schemes}
            blocks[layer] = Block(kind, quantized)
    return blocks


def _arguments(blocks: Sequence[Block]) -> tuple[tuple[dict[str, str], ...], dict[str, str]]:
    """The inputs of a program: for each layer argument -> input; and for every input the tensor of the pipeline.

    Layers that take the same tensor share an input. It is called as the argument, if no other is called so already.
    """
    names: dict[str, str] = {}
    for number, block in enumerate(blocks):
        for argument, source in block.outline.inputs.items():
            names.setdefault(source, f"{number}.{argument}" if argument in names.values() else argument)
    sources = {name: source for source, name in names.items()}
    if len(blocks) == 1:  # Called as the arguments, so that how they are wired does not shape the program.
        return (), sources
    return tuple({argument: names[s] for argument, s in b.outline.inputs.items()} for b in blocks), sources


def _names(segments: Sequence[Segment], rewriting: RewritingSpec) -> list[str]:
    """`first`, `last`, `last_block` for the one that slices; others are counted where there are several."""
    layered = "block" if rewriting.use_blockwise_compile else "stage"
    names = []
    for segment in segments:
        if not segment.layers:
            names.append("first" if segment.first else "last")
        else:
            names.append("last_block" if segment.slices and layered == "block" else layered)
    several = names.count(layered) > 1
    count = iter(range(len(names)))
    return [f"{name}{next(count)}" if several and name == layered else name for name in names]
