"""BuildSpec: everything that determines an artifact, in one frozen, validated value.

Field names are those of the ArtifactBuilder API; the sections are the config groups of `conf/`. So a field is
spelled the same in a recipe, as an override on the command line and in Python.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from furiosa_build.core.devices import DeviceError, elements, kind_of
from furiosa_build.core.errors import UserError
from furiosa_build.recipe.buckets import AppendSize, BucketSpec, derive_append_buckets
from furiosa_build.recipe.section import PositiveInt, Section
from furiosa_build.recipe.section import as_tuple as _as_tuple
from furiosa_build.recipe.section import invalid as _invalid

Scheme = Literal["none", "fp8", "int8"]


class ModelSpec(Section):
    """Which model, from where, and how much of it.

    `architecture` holds the fields of the model's `config.json`. When absent they are read from the model's
    directory or fetched from the hub. `param_file_path` is a safetensors file that holds all parameters: then the
    directory or the hub gives config.json and the tokenizer's files only.
    """

    model_id_or_path: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    num_hidden_layers: PositiveInt | None = None
    seed_for_random_weight: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    param_file_path: Annotated[str, Field(min_length=1)] | None = None
    calculate_logit_only_for_last_token: bool = False
    architecture: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> ModelSpec:
        if self.param_file_path is not None and self.seed_for_random_weight is not None:
            what = f"param_file_path={self.param_file_path!r} and seed_for_random_weight={self.seed_for_random_weight}"
            raise _invalid(f"{what}: weights are read, or drawn", key=("param_file_path",), valid="one of the two")
        return self


class TargetSpec(Section):
    """The machine that programs are compiled for.

    Attributes:
        isa: An x86-64 psABI level, or `native`: this host's.
        num_elements: Processing elements of one device: what `npu:0:*` names.
        memory_gb: Memory of one device in GB (10^9 bytes). None: this host's where `isa` is `native`, else unknown.
            A build whose parameters and KV cache are larger is refused; where the number of KV blocks is not given, it
            is at most what there is room for.
    """

    name: str
    isa: Literal["native", "x86-64-v3", "x86-64-v4"] = "native"
    num_elements: PositiveInt = 1
    memory_gb: Annotated[float, Field(gt=0, strict=False, allow_inf_nan=False)] | None = None


class ParallelSpec(Section):
    """Degrees of parallelism: ranks that share every layer, stages that follow each other, replicas of all that.

    `data_parallel_size` is by default what the devices have elements for; `num_blocks_per_pp_stage`, the layers of each
    stage, by default as many for each.
    """

    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    data_parallel_size: PositiveInt | None = None
    num_blocks_per_pp_stage: Annotated[tuple[PositiveInt, ...], BeforeValidator(_as_tuple)] | None = None

    @property
    def is_divided(self) -> bool:
        """Whether the model is divided among elements, so that each has parameter files of its own."""
        return (self.tensor_parallel_size, self.pipeline_parallel_size) != (1, 1)


class QuantizationRule(Section):
    """`match` is a shell pattern over parameter names such as `model.layers.0.mlp.up_proj.weight`."""

    match: Annotated[str, Field(min_length=1)]
    scheme: Scheme


class QuantizationSpec(Section):
    """Weight-only quantization of linear layers: the first rule that matches wins, else `scheme`.

    Or a compressed-tensors checkpoint, of which the weights are taken as they are: `quantize_artifact_path`.
    """

    scheme: Scheme = "none"
    rules: Annotated[tuple[QuantizationRule, ...], BeforeValidator(_as_tuple)] = ()
    quantize_artifact_path: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _a_checkpoint_has_a_scheme_of_its_own(self) -> QuantizationSpec:
        if self.quantize_artifact_path is not None and (self.scheme != "none" or self.rules):
            given = f"scheme={self.scheme!r} has" if self.scheme != "none" else "rules have"
            what = f"quantize_artifact_path={self.quantize_artifact_path!r} is quantized already: {given} no effect"
            valid = "null, or quantization=none, which is scheme: none without rules"
            raise _invalid(what, key=("quantize_artifact_path",), valid=valid)
        return self

    @model_validator(mode="after")
    def _one_scheme(self) -> QuantizationSpec:
        for index, rule in enumerate(self.rules):
            if rule.scheme not in ("none", self.scheme):
                raise _invalid(
                    f"the rule's scheme {rule.scheme!r} mixes with scheme={self.scheme!r}: "
                    "a checkpoint has one quantized format",
                    key=("rules", index, "scheme"),
                    valid=" or ".join(sorted({"'none'", repr(self.scheme)})),
                )
        return self

    def scheme_of(self, parameter: str) -> Scheme:
        """The scheme for the weight of the linear layer called `parameter`."""
        for rule in self.rules:
            if fnmatch.fnmatchcase(parameter, rule.match):
                return rule.scheme
        return self.scheme


class RewritingSpec(Section):
    """How the model is rewritten into programs.

    Attributes:
        use_blockwise_compile: Layers are compiled apart from what comes before and after them, and equal ones once.
            Else each stage is one program.
        num_blocks_per_supertask: Layers that run as one program.
        do_decompositions_for_model_rewrite: Graphs call operators of core ATen only (and write the KV cache in place).
        embed_all_constants_into_graph: Parameters are constants inside the programs, and no files of their own. A
            program then serves one supertask only.
        add_prefill_last_block_slice: What follows attention in the last layer of prefill is computed for the last token
            of a prompt only.
    """

    use_blockwise_compile: bool = True
    num_blocks_per_supertask: PositiveInt = 1
    do_decompositions_for_model_rewrite: bool = False
    embed_all_constants_into_graph: bool = False
    add_prefill_last_block_slice: bool = False

    @model_validator(mode="after")
    def _has_an_effect(self) -> RewritingSpec:
        if self.num_blocks_per_supertask > 1 and not self.use_blockwise_compile:
            what = f"num_blocks_per_supertask={self.num_blocks_per_supertask}: a stage is one program"
            raise _invalid(what, key=("num_blocks_per_supertask",), valid="1, or use_blockwise_compile=true")
        return self


class SchedulerConfig(Section):
    """Defaults of the runtime's scheduler, kept in the artifact.

    Attributes:
        npu_queue_limit: Steps in flight at a time, where ranks and stages are threads.
        max_processing_samples: Requests admitted at a time, waiting ones included.
        spare_blocks_ratio: Share of the KV blocks kept for sequences that already run.
        is_offline: Requests are ordered for throughput: all that matters is when the last is finished.
        prefill_chunk_size: Most tokens of a prompt that run at once; decode steps come between. None: as many as a
            bucket takes.
    """

    npu_queue_limit: PositiveInt = 2
    max_processing_samples: PositiveInt = 65536
    spare_blocks_ratio: Annotated[float, Field(ge=0, lt=1, strict=False)] = 0.2
    is_offline: bool = False
    prefill_chunk_size: PositiveInt | None = None


class BackendSpec(Section):
    """Which compiler makes the programs: a name of the registry in `furiosa_build.backends`.

    `compiler_config_overrides` sets options of it; those that it does not have are refused with its list.
    """

    name: str
    compiler_config_overrides: dict[str, bool | int | str] = Field(default={})


class SpeculativeSpec(Section):
    """Speculative decoding: a smaller model proposes tokens, which the model itself verifies several at a time.

    Attributes:
        recipe: The name of the recipe that the draft model is built by (`recipe.draft`). None: no draft model.
        num_speculative_tokens: How many it proposes at a time; by default `DEFAULT_SPECULATIVE_TOKENS`.
    """

    recipe: Annotated[str, Field(min_length=1)] | None = None
    num_speculative_tokens: PositiveInt | None = None

    @model_validator(mode="after")
    def _has_an_effect(self) -> SpeculativeSpec:
        if self.recipe is None and self.num_speculative_tokens is not None:
            what = f"num_speculative_tokens={self.num_speculative_tokens}: there is no draft model to propose them"
            raise _invalid(what, key=("num_speculative_tokens",), valid="null, or speculative.recipe=NAME")
        return self


DEFAULT_SPECULATIVE_TOKENS = 4
"""Where a draft is right 7 times of 10, a step gives 2.8 tokens with 4 proposed, and no more than 3.3 with any number:
beyond 4 each one costs a run of the draft, and gives less than 0.2 tokens."""


class BuildSpec(Section):
    """One artifact, fully determined. Made by composing a recipe, or from Python.

    With `speculative.recipe` the artifact has a second model, whose BuildSpec is that of `Recipe.draft`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
    devices: str = "cpu"
    model: ModelSpec
    target: TargetSpec
    backend: BackendSpec
    parallel: ParallelSpec = ParallelSpec()
    buckets: BucketSpec = BucketSpec()
    quantization: QuantizationSpec = QuantizationSpec()
    rewriting: RewritingSpec = RewritingSpec()
    scheduler: SchedulerConfig = SchedulerConfig()
    speculative: SpeculativeSpec = SpeculativeSpec()

    @model_validator(mode="after")
    def _devices_have_elements(self) -> BuildSpec:
        try:
            kind, found = kind_of(self.devices), elements(self.devices, self.target.num_elements)
        except DeviceError as error:
            raise _invalid(str(error), key=("devices",), valid=error.valid) from error
        if kind == "cuda":
            what = f"backend {self.backend.name!r} does not compile for devices={self.devices!r}"
            raise _invalid(what, key=("devices",), valid="cpu, or npu:X with a target that describes it")
        if kind == "npu" and self.target.num_elements == 1:
            what = f"target {self.target.name!r} is no NPU, so it has no devices={self.devices!r}"
            raise _invalid(what, key=("devices",), valid="devices=cpu, or target=rngd")
        ranks, stages, replicas = self.parallel.tensor_parallel_size, self.parallel.pipeline_parallel_size, 1
        replicas = self.parallel.data_parallel_size or 1
        if kind == "npu" and ranks * stages * replicas > len(found):
            needed = f"{ranks} ranks x {stages} stages x {replicas} replicas = {ranks * stages * replicas} elements"
            what = f"devices={self.devices!r} are {len(found)} elements; {needed}"
            asked = {"data_parallel_size": replicas, "tensor_parallel_size": ranks, "pipeline_parallel_size": stages}
            key = next(name for name, size in asked.items() if size > 1)
            raise _invalid(what, key=("parallel", key), valid=f"at most {len(found)} in all")
        return self

    @model_validator(mode="after")
    def _rewriting_fits(self) -> BuildSpec:
        if self.rewriting.add_prefill_last_block_slice and not self.model.calculate_logit_only_for_last_token:
            what = "add_prefill_last_block_slice=True leaves the logits of the last token only"
            valid = "false, or model.calculate_logit_only_for_last_token=true"
            raise _invalid(what, key=("rewriting", "add_prefill_last_block_slice"), valid=valid)
        if self.rewriting.embed_all_constants_into_graph and self.parallel.tensor_parallel_size > 1:
            what = "embed_all_constants_into_graph=True: the ranks have different constants, and share their programs"
            valid = "false, or parallel.tensor_parallel_size=1"
            raise _invalid(what, key=("rewriting", "embed_all_constants_into_graph"), valid=valid)
        return self

    @property
    def data_parallel_size(self) -> int:
        """Replicas: as given, or as many as the elements are enough for. A CPU emulates one."""
        if self.parallel.data_parallel_size is not None:
            return self.parallel.data_parallel_size
        if kind_of(self.devices) != "npu":
            return 1
        of_replica = self.parallel.tensor_parallel_size * self.parallel.pipeline_parallel_size
        return len(elements(self.devices, self.target.num_elements)) // of_replica

    @property
    def num_speculative_tokens(self) -> int | None:
        """Tokens that the draft model proposes at a time; None without one."""
        if self.speculative.recipe is None:
            return None
        return self.speculative.num_speculative_tokens or DEFAULT_SPECULATIVE_TOKENS

    @property
    def append_buckets(self) -> tuple[AppendSize, ...]:
        """As given, or derived."""
        given, chunk_size = self.buckets.append_buckets, self.scheduler.prefill_chunk_size
        if given is not None:
            return given
        return derive_append_buckets(self.buckets, chunk_size, self.num_speculative_tokens)

    @model_validator(mode="after")
    def _chunks_have_buckets(self) -> BuildSpec:
        chunk_size, key = self.scheduler.prefill_chunk_size, ("scheduler", "prefill_chunk_size")
        if chunk_size is None:
            return self
        longest = max(length for _, length in self.buckets.prefill_buckets)
        if chunk_size > longest:
            what = f"prefill_chunk_size={chunk_size} is more than any prefill bucket takes"
            raise _invalid(what, key=key, valid=f"1 to {longest}, or null")
        if not self.append_buckets:
            what = f"prefill_chunk_size={chunk_size}, but no append bucket to run a second chunk with"
            raise _invalid(what, key=key, valid="null, or append buckets such as [[1, 64, 512]]")
        return self

    @model_validator(mode="after")
    def _proposals_can_be_verified(self) -> BuildSpec:
        proposed, key = self.num_speculative_tokens, ("speculative", "num_speculative_tokens")
        if proposed is None:
            return self
        if self.model.calculate_logit_only_for_last_token:
            what = "calculate_logit_only_for_last_token=True: proposed tokens are verified by the logits of each"
            valid = "false where speculative.recipe is given"
            raise _invalid(what, key=("model", "calculate_logit_only_for_last_token"), valid=valid)
        context = min(length for _, length in self.buckets.decode_buckets)
        if proposed + 1 >= context:
            what = f"num_speculative_tokens={proposed} and the one before leave no context in {context} tokens"
            valid = f"1 to {context - 2}" if context > 2 else "decode buckets of more than 2 tokens"
            raise _invalid(what, key=key, valid=valid)
        if all(new <= proposed for _, new, _ in self.append_buckets):
            found = [list(bucket) for bucket in self.append_buckets]
            what = (
                f"num_speculative_tokens={proposed} are verified {proposed + 1} new tokens at a time; not so: {found}"
            )
            valid = f"append buckets of at least {proposed + 1} new tokens, or null: derived"
            raise _invalid(what, key=("buckets", "append_buckets"), valid=valid)
        return self

    @model_validator(mode="after")
    def _weights_come_from_one_place(self) -> BuildSpec:
        path, seed = self.quantization.quantize_artifact_path, self.model.seed_for_random_weight
        if path is not None and seed is not None:
            what = f"seed_for_random_weight={seed} draws weights, quantize_artifact_path={path!r} has others"
            valid = "null where quantization.quantize_artifact_path is given"
            raise _invalid(what, key=("model", "seed_for_random_weight"), valid=valid)
        if path is not None and self.model.param_file_path is not None:
            what = (
                f"param_file_path={self.model.param_file_path!r} and quantize_artifact_path={path!r} both have weights"
            )
            raise _invalid(what, key=("model", "param_file_path"), valid="one of the two")
        return self

    @model_validator(mode="after")
    def _architecture_fits(self) -> BuildSpec:
        if self.model.architecture is not None and (misfit := _misfit(self, self.model.architecture)):
            raise misfit
        return self


def check_architecture(spec: BuildSpec, architecture: Mapping[str, Any], where: str) -> None:
    """Check that a model's `config.json` has what a build needs and that the spec asks for no more than that.

    BuildSpec does this by itself for `model.architecture`; this is for a config.json that was read later.

    Args:
        spec: What is to be built.
        architecture: The fields of config.json.
        where: The file, for the message.
    """
    if misfit := _misfit(spec, architecture):
        context = misfit.context or {}
        raise UserError(context["what"], where=where, valid=context["valid"])


_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


def _misfit(spec: BuildSpec, architecture: Mapping[str, Any]) -> PydanticCustomError | None:
    """The first thing that is wrong between a spec and an architecture."""

    def wrong(name: str, valid: str) -> PydanticCustomError:
        found = f"{name}={architecture[name]!r} is not valid" if name in architecture else f"has no {name}"
        return _invalid(f"the model's architecture: {found}", key=("model", "architecture", name), valid=valid)

    model_type, classes = architecture.get("model_type"), architecture.get("architectures")
    if not (isinstance(model_type, str) and model_type):
        return wrong("model_type", "a string such as llama")
    if not (isinstance(classes, list | tuple) and classes and all(isinstance(name, str) for name in classes)):
        return wrong("architectures", "a list of class names such as [LlamaForCausalLM]")
    for name in _SIZES:
        if type(architecture.get(name)) is not int or architecture[name] < 1:
            return wrong(name, "a whole number of at least 1")

    layers, length = architecture["num_hidden_layers"], architecture["max_position_embeddings"]
    if (asked := spec.model.num_hidden_layers) is not None and asked > layers:
        what = f"num_hidden_layers={asked} is more than the model's own {layers} layers"
        return _invalid(what, key=("model", "num_hidden_layers"), valid=f"1 to {layers}")
    if (asked := spec.buckets.max_seq_len_to_capture) > length:
        what = f"max_seq_len_to_capture={asked} is more than the model's max_position_embeddings={length}"
        return _invalid(what, key=("buckets", "max_seq_len_to_capture"), valid=f"1 to {length}")
    return None


class BuildOptions(Section):
    """Where and how to build. None of it changes the artifact's bytes."""

    save_dir: str = "artifacts"
    cache_dir: str | None = None
    num_compile_workers: PositiveInt = 1
    num_pipeline_builder_workers: PositiveInt = 1
    verify_inputs: bool = False


class Recipe(Section):
    """A composed recipe: what to build, how, and where a relative model path is looked up, in order.

    `draft` is the recipe of the draft model, as it is built for this one (`recipe.draft`).
    """

    spec: BuildSpec
    options: BuildOptions
    roots: tuple[Path, ...]
    draft: Recipe | None = None
