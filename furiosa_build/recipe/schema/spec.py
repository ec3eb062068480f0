"""BuildSpec: everything that determines an artifact, in one frozen, validated value."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from furiosa_build.core.devices import DeviceError, elements, kind_of
from furiosa_build.recipe.schema.architecture import architecture_error
from furiosa_build.recipe.schema.buckets import AppendSize, BucketSpec, derive_append_buckets
from furiosa_build.recipe.schema.model import ModelSpec
from furiosa_build.recipe.schema.parallel import ParallelSpec
from furiosa_build.recipe.schema.qualify import QualifySpec
from furiosa_build.recipe.schema.quantization import QuantizationSpec
from furiosa_build.recipe.schema.rewriting import RewritingSpec
from furiosa_build.recipe.schema.scheduler import SchedulerConfig
from furiosa_build.recipe.schema.section import Section, invalid
from furiosa_build.recipe.schema.speculative import DEFAULT_SPECULATIVE_TOKENS, SpeculativeSpec
from furiosa_build.recipe.schema.target import BackendSpec, TargetSpec


def joined_devices(devices: Any) -> Any:
    """A list of devices as the text that lists them."""
    is_list = isinstance(devices, list | tuple) and all(isinstance(device, str) for device in devices)
    return ",".join(devices) if is_list else devices


class BuildSpec(Section):
    """One artifact, fully determined: composed from a recipe, or built in Python.

    With `speculative.recipe` the artifact has a second model, whose BuildSpec is that of `Recipe.draft`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
    devices: Annotated[str, BeforeValidator(joined_devices)] = "cpu"
    model: ModelSpec
    target: TargetSpec
    backend: BackendSpec
    parallel: ParallelSpec = ParallelSpec()
    buckets: BucketSpec = BucketSpec()
    quantization: QuantizationSpec = QuantizationSpec()
    rewriting: RewritingSpec = RewritingSpec()
    scheduler: SchedulerConfig = SchedulerConfig()
    speculative: SpeculativeSpec = SpeculativeSpec()
    qualify: QualifySpec = QualifySpec()

    @model_validator(mode="after")
    def _devices_have_elements(self) -> BuildSpec:
        try:
            kind, found = kind_of(self.devices), elements(self.devices, self.target.num_elements)
        except DeviceError as error:
            raise invalid(str(error), key=("devices",), valid=error.valid) from error
        if kind == "cuda":
            what = f"backend {self.backend.name!r} does not compile for devices={self.devices!r}"
            raise invalid(what, key=("devices",), valid="cpu, or npu:X with a target that describes it")
        if kind == "npu" and self.target.num_elements == 1:
            what = f"target {self.target.name!r} is not an NPU: it has no devices={self.devices!r}"
            raise invalid(what, key=("devices",), valid="devices=cpu, or target=rngd")
        ranks, stages, replicas = self.parallel.tensor_parallel_size, self.parallel.pipeline_parallel_size, 1
        replicas = self.parallel.data_parallel_size or 1
        if kind == "npu" and ranks * stages * replicas > len(found):
            needed = f"{ranks} ranks x {stages} stages x {replicas} replicas = {ranks * stages * replicas} elements"
            what = f"devices={self.devices!r} are {len(found)} elements; {needed}"
            asked = {"data_parallel_size": replicas, "tensor_parallel_size": ranks, "pipeline_parallel_size": stages}
            key = next(name for name, size in asked.items() if size > 1)
            raise invalid(what, key=("parallel", key), valid=f"at most {len(found)} in all")
        return self

    @model_validator(mode="after")
    def _rewriting_fits(self) -> BuildSpec:
        if self.rewriting.add_prefill_last_block_slice and not self.model.calculate_logit_only_for_last_token:
            what = "add_prefill_last_block_slice=True leaves the logits of the last token only"
            valid = "false, or model.calculate_logit_only_for_last_token=true"
            raise invalid(what, key=("rewriting", "add_prefill_last_block_slice"), valid=valid)
        if self.rewriting.embed_all_constants_into_graph and self.parallel.tensor_parallel_size > 1:
            what = "embed_all_constants_into_graph=True: the ranks have different constants, and share their programs"
            valid = "false, or parallel.tensor_parallel_size=1"
            raise invalid(what, key=("rewriting", "embed_all_constants_into_graph"), valid=valid)
        return self

    @property
    def data_parallel_size(self) -> int:
        """Number of replicas: as given, or as many as the devices have elements for. A CPU emulates one."""
        if self.parallel.data_parallel_size is not None:
            return self.parallel.data_parallel_size
        if kind_of(self.devices) != "npu":
            return 1
        per_replica = self.parallel.tensor_parallel_size * self.parallel.pipeline_parallel_size
        return len(elements(self.devices, self.target.num_elements)) // per_replica

    @property
    def num_speculative_tokens(self) -> int | None:
        """Tokens that the draft model proposes at a time; None without a draft."""
        if self.speculative.recipe is None:
            return None
        return self.speculative.num_speculative_tokens or DEFAULT_SPECULATIVE_TOKENS

    @property
    def append_buckets(self) -> tuple[AppendSize, ...]:
        """The append buckets as given, or derived from the other buckets (`derive_append_buckets`)."""
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
            raise invalid(what, key=key, valid=f"1 to {longest}, or null")
        if not self.append_buckets:
            what = f"prefill_chunk_size={chunk_size}, but no append bucket to run a second chunk with"
            raise invalid(what, key=key, valid="null, or append buckets such as [[1, 64, 512]]")
        return self

    @model_validator(mode="after")
    def _proposals_can_be_verified(self) -> BuildSpec:
        proposed, key = self.num_speculative_tokens, ("speculative", "num_speculative_tokens")
        if proposed is None:
            return self
        if self.model.calculate_logit_only_for_last_token:
            what = "calculate_logit_only_for_last_token=True: proposed tokens are verified by the logits of each"
            valid = "false where speculative.recipe is given"
            raise invalid(what, key=("model", "calculate_logit_only_for_last_token"), valid=valid)
        context = min(length for _, length in self.buckets.decode_buckets)
        if proposed + 1 >= context:
            what = f"num_speculative_tokens={proposed} and the one before leave no context in {context} tokens"
            valid = f"1 to {context - 2}" if context > 2 else "decode buckets of more than 2 tokens"
            raise invalid(what, key=key, valid=valid)
        if all(new <= proposed for _, new, _ in self.append_buckets):
            found = [list(bucket) for bucket in self.append_buckets]
            what = (
                f"num_speculative_tokens={proposed} are verified {proposed + 1} new tokens at a time; not so: {found}"
            )
            valid = f"append buckets of at least {proposed + 1} new tokens, or null: derived"
            raise invalid(what, key=("buckets", "append_buckets"), valid=valid)
        return self

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> BuildSpec:
        path, seed = self.quantization.quantize_artifact_path, self.model.seed_for_random_weight
        if path is not None and seed is not None:
            what = f"seed_for_random_weight={seed} draws weights, quantize_artifact_path={path!r} has others"
            valid = "null where quantization.quantize_artifact_path is given"
            raise invalid(what, key=("model", "seed_for_random_weight"), valid=valid)
        if path is not None and self.model.param_file_path is not None:
            what = (
                f"param_file_path={self.model.param_file_path!r} and quantize_artifact_path={path!r} both have weights"
            )
            raise invalid(what, key=("model", "param_file_path"), valid="one of the two")
        return self

    @model_validator(mode="after")
    def _architecture_fits(self) -> BuildSpec:
        if self.model.architecture is not None and (misfit := architecture_error(self, self.model.architecture)):
            raise misfit
        return self
