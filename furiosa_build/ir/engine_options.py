"""The options of scheduler and engine, once for recipe, artifact, engine and server: types, bounds and meanings."""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Any, get_args

from pydantic import Field
from pydantic.fields import FieldInfo

NpuQueueLimit = Annotated[
    int, Field(ge=1, description="Batches in flight at a time, where ranks and stages are threads.")
]
MaxProcessingSamples = Annotated[int, Field(ge=1, description="Requests admitted at a time, waiting ones included.")]
SpareBlocksRatio = Annotated[
    float, Field(ge=0, lt=1, description="Share of the KV blocks kept for sequences that already run.")
]
IsOffline = Annotated[
    bool, Field(description="Whether all that matters is when the last request is finished: ordered for throughput.")
]
PrefillChunkSize = Annotated[
    int, Field(ge=1, description="Most tokens of a prompt that run at once; decode steps come between.")
]

PublicKey = Annotated[str, Field(description="PEM file of the key that the artifact must be signed with.")]
Tokenizer = Annotated[str, Field(description="Directory with the files of another tokenizer than the artifact's.")]
Seed = Annotated[int, Field(description="Seed of requests that have none of their own. (default: drawn)")]
Devices = Annotated[
    str,
    Field(
        description="What to run on: cpu, npu:0, npu:0:*, npu:0:0-3, or several joined by commas. Must have enough "
        "elements for all ranks, stages and replicas."
    ),
]
TensorParallelSize = Annotated[int, Field(description="Ranks of a stage; fixed when an artifact is built.")]
PipelineParallelSize = Annotated[int, Field(description="Stages that the layers are divided among.")]
DataParallelSize = Annotated[
    int, Field(description="Copies of the model. If not given, as many as the devices have elements for.")
]
PagedAttentionNumBlocks = Annotated[int, Field(description="KV blocks of a layer.")]
EnablePrefixCaching = Annotated[
    bool, Field(description="Whether requests share the KV blocks of tokens that they begin with alike.")
]
NumThreads = Annotated[
    int,
    Field(
        description="Threads that compute, of all ranks, stages and replicas together. If not given, as many as this "
        "process may keep busy, by its affinity mask and, with backend native, its quota of processor time."
    ),
]
PinThreads = Annotated[bool, Field(description="Whether the threads of each rank run on cores of their own.")]
NumSpeculativeTokens = Annotated[
    int,
    Field(description="Tokens that the draft model proposes at a time: fewer than the artifact's append buckets take."),
]
UseSpeculativeDecoding = Annotated[bool, Field(description="Whether to use the artifact's draft model, if it has one.")]
DraftNumBlocks = Annotated[int, Field(description="KV blocks of a draft's layer.")]


def description(annotation: Any) -> str:
    """What an option of that type is, from the type or from one of a union's; empty when none says it."""
    for each in (annotation, *get_args(annotation)):
        for metadata in getattr(each, "__metadata__", ()):
            if isinstance(metadata, FieldInfo) and metadata.description:
                return metadata.description
    return ""


def plain_type(annotation: Any) -> type:
    """The first type of a union, without None and what is annotated: `int` of `NpuQueueLimit | None`."""
    if hasattr(annotation, "__metadata__"):
        return plain_type(annotation.__origin__)
    members = [each for each in get_args(annotation) if each is not NoneType]
    return plain_type(members[0]) if members else annotation
