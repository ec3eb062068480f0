"""The artifact's JSON files as types. docs/artifact-format.md is the specification in prose; keep the two together.

`Artifact`, `ArtifactMetadata` and `ArtifactVersion` have the fields of the Furiosa LLM API of the same names.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from furiosa_build.core.canonical_json import digest
from furiosa_build.ir.engine_options import (
    IsOffline,
    MaxProcessingSamples,
    NpuQueueLimit,
    PrefillChunkSize,
    SpareBlocksRatio,
)
from furiosa_build.ir.tensors import TensorSpec

SCHEMA_VERSION: Literal[4] = 4

ARTIFACT_FILE = "artifact.json"
MANIFEST_FILE = "manifest.json"
PROVENANCE_FILE = "provenance.json"
TIMESTAMP_FILE = "timestamp.json"
SIGNATURE_FILE = "model.sig"
DRAFT_DIRECTORY = "draft/"
"""Prefix of the names of the draft model's files."""


class Record(BaseModel):
    """Base class of every part of the artifact's JSON: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)


class ArtifactVersion(Record):
    """Versions of the tools that made the artifact. `furiosa_compiler` is such as `inductor 2.13.0`."""

    furiosa_llm: str
    furiosa_compiler: str


class ArtifactMetadata(Record):
    """Identity of an artifact. `artifact_id` derives from the content (see the function `artifact_id`).

    `timestamp` (Unix seconds) is not in artifact.json: timestamp.json has it, and opening an artifact fills it in.
    """

    artifact_id: str
    name: str
    timestamp: int = Field(default=0, exclude=True)
    version: ArtifactVersion


class SchedulerDefaults(Record):
    """The recipe's `scheduler` section, as the API names its fields."""

    npu_queue_limit: NpuQueueLimit
    max_processing_samples: MaxProcessingSamples
    spare_blocks_ratio: SpareBlocksRatio
    is_offline: IsOffline
    prefill_chunk_size: PrefillChunkSize | None


class KvCacheSharing(Record):
    """Beam searches that the decode buckets are made for: beams of a search, and most tokens that each generates."""

    beam_width: int = Field(ge=1)
    max_new_tokens: int = Field(ge=1)


class GeneratorConfig(Record):
    """What the engine plans with: bucket sizes as (batch, tokens) and the KV cache's default size per layer.

    Those of append buckets are (batch, new tokens, tokens). `num_speculative_tokens` is how many tokens the draft model
    proposes at a time; None without a draft. With `output_last_hidden_state` prefill and append pipelines give
    `last_hidden_state` beside `logits`; it is absent where it is false.
    """

    prefill_buckets: list[tuple[int, int]]
    append_buckets: list[tuple[int, int, int]]
    decode_buckets: list[tuple[int, int]]
    max_seq_len_to_capture: int
    paged_attention_num_blocks: int = Field(ge=1)
    paged_attention_block_size: int = Field(ge=1)
    calculate_logit_only_for_last_token: bool
    output_last_hidden_state: bool = Field(default=False, exclude_if=lambda given: not given)
    kv_cache_sharing_across_beams_config: KvCacheSharing | None
    num_speculative_tokens: int | None = Field(default=None, ge=1)
    default_scheduler_config: SchedulerDefaults


class ModelMetadata(Record):
    """Which model this is. `revision` is the resolved commit of a hub model.

    `weights_digest` is the digest of the source weights; `seed_for_random_weight` is set when they are random. Names of
    the parameters of layer 3 begin with `layer_prefix` and `3.`.
    """

    pretrained_id: str
    revision: str | None
    weights_digest: str
    seed_for_random_weight: int | None
    architecture: str
    dtype: str
    num_hidden_layers: int
    layer_prefix: str
    vocab_size: int
    num_parameters: int
    quantization: str


class ModelRewritingConfig(Record):
    """How the model was cut into programs."""

    use_blockwise_compile: bool
    num_blocks_per_supertask: int
    do_decompositions_for_model_rewrite: bool
    embed_all_constants_into_graph: bool
    add_prefill_last_block_slice: bool
    calculate_logit_only_for_last_token: bool


class ParallelConfig(Record):
    """Degrees of parallelism: ranks of a stage, stages, replicas."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int


class Target(Record):
    """Requirements for loading the programs: an instruction set (`any` for portable ones) and a version of torch.

    `num_elements` are the processing elements of one device.
    """

    name: str
    num_elements: int = Field(ge=1)
    isa: str
    torch: str


class Program(Record):
    """One compiled graph. `inputs` and `outputs` are in calling order. KV caches are written in place.

    `entry` is its name in a file that holds several programs; it is absent where the file is one program.
    """

    file: str
    entry: str | None = Field(default=None, exclude_if=lambda entry: entry is None)
    kind: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class Supertask(Record):
    """One step of a pipeline, on `stage`, by every one of `ranks`: run `program`, or (`comm`) join or pass on tensors.

    Attributes:
        program: The program of a `comp` supertask.
        op: What a `comm` supertask does: `all_reduce` gives every rank the sum of the ranks' tensors, `all_gather` the
            tensors side by side along the last dimension, in order of ranks; `send` gives them to the same rank of the
            next stage.
        inputs: Program input -> tensor of the pipeline, for every activation; for `comm` tensor -> tensor.
        outputs: Names of the program's outputs in the pipeline, in order; or of the joined tensor.
        layers: The decoder layers that the program is run for.
    """

    kind: Literal["comp", "comm"]
    program: str | None = None
    op: Literal["all_reduce", "all_gather", "send"] | None = None
    stage: int
    ranks: list[int]
    inputs: dict[str, str]
    outputs: list[str]
    layers: list[int] = []


class Pipeline(Record):
    """A bucket: `batch_size` sequences, each `query_length` new tokens over a context of `context_length`."""

    name: str
    phase: Literal["prefill", "append", "decode"]
    batch_size: int = Field(ge=1)
    query_length: int = Field(ge=1)
    context_length: int = Field(ge=1)
    supertasks: list[Supertask]


class ParameterFiles(Record):
    """The safetensors files that hold the parameters of one rank of one stage."""

    stage: int
    rank: int
    files: list[str]


class KvCacheSpec(Record):
    """KV storage of one layer: two tensors (keys, values) of shape [slots, *shape_per_slot]; a slot holds one token.

    `value_shape_per_slot` is that of the values where it is another; else it is absent.
    """

    layer: int
    stage: int
    dtype: str
    shape_per_slot: list[int]
    value_shape_per_slot: list[int] | None = Field(default=None, exclude_if=lambda shape: shape is None)

    @property
    def shapes(self) -> dict[str, list[int]]:
        """What a slot holds, by the name that programs have for the tensor."""
        values = self.shape_per_slot if self.value_shape_per_slot is None else self.value_shape_per_slot
        return {"key_cache": self.shape_per_slot, "value_cache": values}


class Artifact(Record):
    """The content of artifact.json.

    `library` is the file that holds what all programs call; it is absent where they need none.

    `draft` is the model that proposes tokens for speculative decoding: an artifact within this one, with programs and
    parameters of its own below draft/ and an `artifact_id` of its own. It has no draft itself.
    """

    schema_version: Literal[4] = SCHEMA_VERSION
    metadata: ArtifactMetadata
    devices: str
    generator_config: GeneratorConfig
    hf_config: dict[str, Any]
    model_metadata: ModelMetadata
    model_rewriting_config: ModelRewritingConfig
    parallel_config: ParallelConfig
    backend: str
    target: Target
    library: str | None = Field(default=None, exclude_if=lambda file: file is None)
    programs: dict[str, Program]
    pipelines: list[Pipeline]
    parameters: list[ParameterFiles]
    kv_cache: list[KvCacheSpec]
    draft: Artifact | None = None


class FileRecord(Record):
    """Size in bytes and sha256 (hex) of one file of the artifact."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(Record):
    """manifest.json: every other file by its path relative to the artifact, but timestamp.json and a signature."""

    schema_version: Literal[4] = SCHEMA_VERSION
    artifact_id: str
    files: dict[str, FileRecord]


class Timestamp(Record):
    """timestamp.json: when the artifact was published (Unix seconds). `sha256` is the digest of the other fields."""

    schema_version: Literal[4] = SCHEMA_VERSION
    artifact_id: str
    timestamp: int
    sha256: str

    @classmethod
    def of(cls, artifact_id: str, timestamp: int) -> Timestamp:
        """The record of a publication at `timestamp` (Unix seconds)."""
        return cls(artifact_id=artifact_id, timestamp=timestamp, sha256=digest([artifact_id, timestamp]))


def to_json(value: Record | dict[str, Any]) -> bytes:
    """The canonical bytes of one of the artifact's own files: JSON, sorted, indented, UTF-8."""
    data = value.model_dump(mode="json") if isinstance(value, Record) else value
    return (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def artifact_id(artifact: Artifact, files: dict[str, FileRecord]) -> str:
    """sha256 of the artifact's content: artifact.json without the id, and the digests of the files it describes.

    The content of a draft model is its part of artifact.json and its files.
    """
    data = artifact.model_dump(mode="json")
    data["metadata"]["artifact_id"] = ""
    described = {path: r.sha256 for path, r in files.items() if path not in (ARTIFACT_FILE, PROVENANCE_FILE)}
    return digest({"artifact": data, "files": described})
