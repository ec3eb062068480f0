"""The arguments of the engines, as the Furiosa LLM API has them: from Python, or from a command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Literal, Self, get_type_hints

from pydantic import Field, ValidationError

from furiosa_build.artifact.reader import OpenArtifact
from furiosa_build.artifact.schema import Artifact, GeneratorConfig
from furiosa_build.artifact.signing import open_signed
from furiosa_build.artifact.stages import restage
from furiosa_build.core.devices import DeviceError, elements, kind_of
from furiosa_build.core.errors import UserError
from furiosa_build.ir import engine_options as options

DEFAULT_CACHE = "$HOME/.cache/furiosa/llm"


def _boolean(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return values[text.lower()]


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """The arguments of `LLMEngine.from_engine_args`. None stands for what the artifact prefers.

    `ir.engine_options` says what each argument does; `open` applies those that concern the artifact, and refuses what
    it cannot do.
    """

    model: Annotated[str, Field(description="Directory of the artifact.")]
    public_key: options.PublicKey | None = None
    tokenizer: options.Tokenizer | None = None
    tokenizer_mode: Annotated[str, Field(description='Only "auto": tokenizers are fast ones.')] = "auto"
    seed: options.Seed | None = None
    devices: options.Devices | Sequence[str] | None = None
    tensor_parallel_size: options.TensorParallelSize | None = None
    pipeline_parallel_size: options.PipelineParallelSize | None = None
    data_parallel_size: options.DataParallelSize | None = None
    cache_dir: Annotated[str, Field(description="An engine generates no files, so nothing is kept there.")] | None = (
        DEFAULT_CACHE
    )
    paged_attention_num_blocks: options.PagedAttentionNumBlocks | None = None
    npu_queue_limit: options.NpuQueueLimit | None = None
    max_processing_samples: options.MaxProcessingSamples | None = None
    spare_blocks_ratio: options.SpareBlocksRatio | None = None
    is_offline: options.IsOffline | None = None
    prefill_chunk_size: options.PrefillChunkSize | None = None
    enable_prefix_caching: options.EnablePrefixCaching = True
    num_threads: options.NumThreads | None = None
    pin_threads: options.PinThreads = False

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Adds an option for every argument: `--max-processing-samples N`."""
        hints = get_type_hints(cls, include_extras=True)
        for each in fields(cls):
            read = options.plain_type(hints[each.name])
            default = None if each.default is MISSING else each.default
            shown = "" if default is None else f" (default: {default})"
            parser.add_argument(
                f"--{each.name.replace('_', '-')}",
                type=_boolean if read is bool else read,
                required=each.default is MISSING,
                default=default,
                help=(options.description(hints[each.name]) + shown).replace("%", "%%"),
            )
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """The arguments that a parser with these options has read."""
        return cls(**{each.name: getattr(args, each.name) for each in fields(cls)})

    def open(self, verify: Literal["fast", "full"] = "fast") -> OpenArtifact:
        """The artifact, with what the arguments override in place of what it prefers.

        Raises:
            UserError: The artifact cannot be used, or an argument is not valid, or not possible with it.
            VerificationError: The artifact is not signed with `public_key`, if that is given.
        """
        self._refuse_impossible()
        opened = open_signed(self.model, self.public_key, verify)
        return OpenArtifact(opened.directory, self._override(opened.artifact), opened.manifest)

    def _refuse_impossible(self) -> None:
        """Raises UserError for what no artifact can do."""
        if self.tokenizer_mode != "auto":
            what = f"tokenizer_mode={self.tokenizer_mode!r}: the runtime has fast tokenizers only"
            raise UserError(what, where="tokenizer_mode", valid="auto")
        if self.cache_dir is not None and str(self.cache_dir) != DEFAULT_CACHE:
            what = f"cache_dir={str(self.cache_dir)!r}: an engine generates no files, so there is nothing to keep there"
            raise UserError(what, where="cache_dir", valid=f"{DEFAULT_CACHE} or None, which are the same")

    def _override(self, artifact: Artifact) -> Artifact:
        if self.tensor_parallel_size not in (None, artifact.parallel_config.tensor_parallel_size):
            ranks = artifact.parallel_config.tensor_parallel_size
            raise UserError(
                f"tensor_parallel_size={self.tensor_parallel_size}: the artifact is divided among {ranks} ranks",
                where="tensor_parallel_size",
                valid=str(ranks),
                hint="it is fixed when an artifact is built: build another",
            )
        if self.pipeline_parallel_size is not None:
            artifact = restage(artifact, self.pipeline_parallel_size)
        devices, replicas = self._placed(artifact)
        return artifact.model_copy(
            update={
                "devices": devices,
                "parallel_config": artifact.parallel_config.model_copy(update={"data_parallel_size": replicas}),
                "generator_config": self._generator_config(artifact),
            }
        )

    def _generator_config(self, artifact: Artifact) -> GeneratorConfig:
        config = artifact.generator_config.model_dump()
        if self.prefill_chunk_size is not None and not config["append_buckets"]:
            raise UserError(
                f"prefill_chunk_size={self.prefill_chunk_size}: the artifact has no append buckets for further pieces",
                where="prefill_chunk_size",
                hint="build it with append_buckets, or with a prefill_chunk_size",
            )
        for section in (config, config["default_scheduler_config"]):
            # Lists of buckets are of the artifact alone.
            section.update((name, value) for name in section if (value := getattr(self, name, None)) is not None)
        try:
            return GeneratorConfig.model_validate(config)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][-1])
            raise UserError(f"{name} does not take {first['input']!r}", where=name, valid=first["msg"]) from error

    def _placed(self, artifact: Artifact) -> tuple[str, int]:
        """The devices, and how many replicas they run."""
        parallel, of_npu = artifact.parallel_config, artifact.target.num_elements
        given = artifact.devices if self.devices is None else self.devices
        devices = given if isinstance(given, str) else ",".join(given)
        try:
            kind, found = kind_of(devices), len(elements(devices, of_npu))
        except DeviceError as error:
            raise UserError(str(error), where="devices", valid=error.valid) from error
        if kind == "cuda" or (kind == "npu" and of_npu == 1):
            what = f"devices={devices!r}: the artifact's programs are for target {artifact.target.name!r}"
            raise UserError(what, where="devices", valid="cpu" if of_npu == 1 else "cpu, or npu:X")
        replicas = parallel.data_parallel_size if self.data_parallel_size is None else self.data_parallel_size
        if replicas < 1:
            raise UserError(f"data_parallel_size does not take {replicas}", where="data_parallel_size", valid=">= 1")
        if kind == "cpu":  # emulates any number of elements
            return devices, replicas
        ranks, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        if self.data_parallel_size is None and (self.devices, self.pipeline_parallel_size) != (None, None):
            replicas = max(1, found // (ranks * stages))
        if (total := ranks * stages * replicas) > found:
            raise UserError(
                f"devices={devices!r} are {found} elements; {ranks} ranks (fixed at build) x {stages} stages x "
                f"{replicas} replicas = {total} elements",
                where="devices",
                valid=f"at least {total} elements",
            )
        return devices, replicas


@dataclass(frozen=True, kw_only=True)
class AsyncEngineArgs(EngineArgs):
    """The arguments of `AsyncLLMEngine.from_engine_args`."""

    num_speculative_tokens: options.NumSpeculativeTokens | None = None
    backend: (
        Annotated[str, Field(description="That of the artifact, whose programs no other backend can run.")] | None
    ) = None
    use_speculative_decoding_if_possible: options.UseSpeculativeDecoding = True
    speculative_model_paged_attention_num_blocks: options.DraftNumBlocks | None = None
    packing_type: Annotated[str, Field(description='How prompts are packed: "IDENTITY" only.')] = "IDENTITY"

    def _refuse_impossible(self) -> None:
        super()._refuse_impossible()
        if self.packing_type != "IDENTITY":
            raise UserError(f"packing_type does not take {self.packing_type!r}", where="packing_type", valid="IDENTITY")

    def _override(self, artifact: Artifact) -> Artifact:
        if self.backend not in (None, artifact.backend):
            what = f"backend={self.backend!r}: the artifact's programs are of backend {artifact.backend!r}"
            raise UserError(what, where="backend", valid=artifact.backend)
        return super()._override(self._override_draft(artifact))

    def _override_draft(self, artifact: Artifact) -> Artifact:
        draft = artifact.draft if self.use_speculative_decoding_if_possible else None
        if draft is None:
            why = "the artifact has no draft model"
            if artifact.draft is not None:
                why = "use_speculative_decoding_if_possible is False"
            for name in ("num_speculative_tokens", "speculative_model_paged_attention_num_blocks"):
                if (value := getattr(self, name)) is not None:
                    raise UserError(f"{name}={value}: {why}", where=name, valid="None")
            config = artifact.generator_config.model_copy(update={"num_speculative_tokens": None})
            return artifact.model_copy(update={"draft": None, "generator_config": config})
        most = max((new - 1 for _, new, _ in artifact.generator_config.append_buckets), default=0)
        if self.num_speculative_tokens is not None and not 1 <= self.num_speculative_tokens <= most:
            what = f"num_speculative_tokens={self.num_speculative_tokens}: no append bucket takes so many, and one more"
            raise UserError(what, where="num_speculative_tokens", valid=f"1 to {most}")
        blocks, name = self.speculative_model_paged_attention_num_blocks, "speculative_model_paged_attention_num_blocks"
        if blocks is None:
            return artifact
        if blocks < 1:
            raise UserError(f"{name} does not take {blocks}", where=name, valid=">= 1")
        config = draft.generator_config.model_copy(update={"paged_attention_num_blocks": blocks})
        draft = draft.model_copy(update={"generator_config": config})
        return artifact.model_copy(update={"draft": draft})
