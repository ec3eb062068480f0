"""What is known of one model before a build: the facts that its steps are planned from. No I/O, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from furiosa_build.backends.registry import get_backend
from furiosa_build.core.errors import UserError
from furiosa_build.ir.outline import Outline
from furiosa_build.ir.sharding import Cut, Share
from furiosa_build.ir.stages import split_layers
from furiosa_build.ir.tokenizer import TokenizerOutline
from furiosa_build.plan.kinds import Kind, find_kinds, outer_parameters
from furiosa_build.plan.resolved import pretrained_id, without_place
from furiosa_build.quant.scheme import scheme, summary
from furiosa_build.recipe.schema import BuildSpec, ParallelSpec
from furiosa_build.recipe.schema.buckets import Phase, bucket_name

if TYPE_CHECKING:
    from furiosa_build.quant.compressed_tensors import QuantizedCheckpoint

DRAFT = "draft"
"""The id of the draft model; that of the model itself is empty."""


def step_name(model_id: str, own_name: str) -> str:
    """What people, logs and other models' keys call a step of a model: `compile`, or `draft:compile`."""
    return f"{model_id}:{own_name}" if model_id else own_name


@dataclass(frozen=True)
class Bucket:
    """A static shape that is compiled: `query` new tokens of each of `batch` sequences over a context of `context`."""

    phase: Phase
    batch: int
    query: int
    context: int

    @property
    def name(self) -> str:
        """The name of the bucket, such as `decode-4x512`, `append-1x64x512`."""
        new = (self.query,) if self.phase == "append" else ()
        return bucket_name(self.phase, (self.batch, *new, self.context))


@dataclass(frozen=True)
class ModelPlan:
    """One of the models of an artifact, and how it is divided.

    Attributes:
        spec: What is built of it.
        hf_config: The fields of its config.json.
        outline: The model's layers and parameters.
        isa: The instruction set that its programs are compiled for.
        schemes: The scheme of every quantized parameter, by full name.
        taken: The weights are quantized already, and taken as they are.
        stored_as: As in Loading: how transformers would read the source's weights, if they have to be converted.
        tokenizer: The tokenizer of the artifact; None: it has none, or is the model's whose draft this one is.
    """

    spec: BuildSpec
    hf_config: Mapping[str, Any]
    outline: Outline
    isa: str
    schemes: Mapping[str, str]
    taken: bool = False
    stored_as: Mapping[str, Any] | None = None
    tokenizer: TokenizerOutline | None = None

    @cached_property
    def stages(self) -> list[list[int]]:
        """The layers of each pipeline stage."""
        return split_into_stages(self.outline.num_layers, self.spec.parallel)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The static shapes that are compiled."""
        return tuple(_buckets(self.spec))

    @cached_property
    def kinds(self) -> Mapping[Bucket, tuple[Kind, ...]]:
        """The kinds of supertask of each bucket."""
        rewriting = self.spec.rewriting
        return {
            b: find_kinds(self.outline, self.schemes, self.stages, rewriting, _slices(self.spec, b))
            for b in self.buckets
        }

    @property
    def quantization(self) -> str:
        """The schemes that quantized parameters have, such as `fp8` or `fp8+int8`, or `none`."""
        return summary(self.schemes.values())

    @property
    def writes_checkpoint(self) -> bool:
        """Whether `quantize` writes weights; else it checks those that there are."""
        return not self.taken and bool(self.schemes)

    @cached_property
    def packs(self) -> bool:
        """Whether parameters are stored in a layout of the backend's own. Those that programs hold are not."""
        embeds = self.spec.rewriting.embed_all_constants_into_graph
        return not embeds and get_backend(self.spec.backend.name).packer(self.isa) is not None

    @property
    def seed(self) -> int | None:
        """The seed that the weights are drawn from; None: they are read."""
        return self.spec.model.seed_for_random_weight

    @property
    def ranks(self) -> int:
        """Ranks of a stage."""
        return self.spec.parallel.tensor_parallel_size

    @property
    def pretrained_id(self) -> str:
        """The model's name, without directories of a machine."""
        return pretrained_id(self.spec.model)

    @property
    def checkpoint_name(self) -> str | None:
        """The name of the quantized checkpoint that is taken, without directories of a machine."""
        path = self.spec.quantization.quantize_artifact_path
        return None if path is None else without_place(path)

    def parameters_of(self, kind: Kind) -> dict[str, str]:
        """The parameters that the first supertask of a kind reads, by the names that it has for them.

        Those outside of layers have their own names, those of a layer `NUMBER.NAME`.
        """
        segment = kind.segment
        names = {name: name for name in outer_parameters(segment, self.outline)}
        for number, (layer, block) in enumerate(zip(segment.layers, kind.blocks, strict=True)):
            names |= {f"{number}.{n}": f"{self.outline.layer_prefix}{layer}.{n}" for n in block.outline.parameters}
        return names

    def cuts_of(self, kind: Kind) -> dict[str, Cut]:
        """How these parameters are divided among ranks; those that are not are left out."""
        cuts = {name: self.outline.parameters[full].cut for name, full in self.parameters_of(kind).items()}
        return {name: cut for name, cut in cuts.items() if cut is not None}


def plan_model(
    spec: BuildSpec,
    hf_config: Mapping[str, Any],
    outline: Outline,
    isa: str,
    checkpoint: QuantizedCheckpoint | None = None,
    stored_as: Mapping[str, Any] | None = None,
) -> ModelPlan:
    """One of the models of an artifact.

    `checkpoint`: the quantized weights that its spec takes, if it does. `stored_as`: as in ModelPlan.

    Raises UserError where a scheme cannot store a weight, or a rank's share of it, or the backend cannot compute with
    it; or where a bucket is longer than the rotary tables allow.
    """
    scheme_of = spec.quantization.scheme_of if checkpoint is None else checkpoint.scheme_of
    schemes = {name: scheme_of(name) for name, p in outline.parameters.items() if p.linear}
    if spec.quantization.lm_head is not None:
        schemes[_head(outline)] = spec.quantization.lm_head
    quantized = {name: text for name, text in schemes.items() if text != "none"}
    _check_backend(spec.backend.name, quantized)
    _check_kv_cache(spec)
    _check_schemes(outline, quantized, spec.parallel.tensor_parallel_size)
    _check_rotary_limit(outline, spec)
    return ModelPlan(spec, hf_config, outline, isa, quantized, checkpoint is not None, stored_as)


def _head(outline: Outline) -> str:
    if outline.head is None:
        what = f"the head of {outline.architecture} cannot be quantized: it, or what it is tied to, is no plain layer"
        raise UserError(what, where="quantization.lm_head", valid="null")
    return outline.head


def _check_backend(name: str, schemes: Mapping[str, str]) -> None:
    for text in sorted(set(schemes.values())):
        if other := get_backend(name).instead_for(text):
            what = f"backend {name} does not compute with {text} weights"
            raise UserError(what, where="backend.name", hint=f"build with {other}")


def _check_kv_cache(spec: BuildSpec) -> None:
    name, asked = spec.backend.name, spec.buckets.kv_cache_dtype
    if asked not in (valid := get_backend(name).kv_cache_dtypes):
        what = f"backend {name} has no KV caches of kv_cache_dtype={asked!r}"
        raise UserError(what, where="buckets.kv_cache_dtype", valid=", ".join(valid), hint="build with backend=native")


def _check_schemes(outline: Outline, schemes: Mapping[str, str], ranks: int) -> None:
    for name, text in schemes.items():
        parameter = outline.parameters[name]
        local = Share(parameter.layout, parameter.cut if ranks > 1 else None, ranks).local
        if reason := scheme(text).refusal(local):
            shared = f" for {ranks} ranks" if local != parameter.layout else ""
            raise UserError(f"{name} cannot be quantized to {text}{shared}: {reason}", where="quantization")


def _check_rotary_limit(outline: Outline, spec: BuildSpec) -> None:
    """A sequence may not grow to where its rotary tables change: all keys before would have to be computed anew."""
    limit, longest = outline.rotary_limit, max(bucket.context for bucket in _buckets(spec))
    if limit is not None and longest > limit.longest:
        raise UserError(
            f"rotary embedding of type {limit.rope_type!r}: beyond {limit.longest} tokens its tables depend on the "
            f"length of the sequence, which is not supported, and the longest bucket has {longest}",
            where="buckets",
            valid=f"buckets of up to {limit.longest} tokens, where the tables are constant",
            hint=f"set buckets.max_seq_len_to_capture={limit.longest}, and buckets that are no longer",
        )


def split_into_stages(layers: int, parallel: ParallelSpec) -> list[list[int]]:
    """The layers of each stage, in order: as given, or as many for each, the first ones one more if need be."""
    if parallel.num_blocks_per_pp_stage is not None:
        ends = list(accumulate(parallel.num_blocks_per_pp_stage))
        return [list(range(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]
    return [list(part) for part in split_layers(layers, parallel.pipeline_parallel_size)]


def _buckets(spec: BuildSpec) -> Iterator[Bucket]:
    for batch, length in spec.buckets.prefill_buckets:
        yield Bucket("prefill", batch, length, length)
    for batch, new, length in spec.append_buckets:
        yield Bucket("append", batch, new, length)
    for batch, length in spec.buckets.compiled_decode_buckets:
        yield Bucket("decode", batch, 1, length)


def _slices(spec: BuildSpec, bucket: Bucket) -> bool:
    return spec.rewriting.add_prefill_last_block_slice and bucket.phase != "decode" and bucket.query > 1
