"""What a server can be told: by options of the command line, by a YAML file, or by both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from furiosa_build.core.errors import UserError, nearest
from furiosa_build.ir import engine_options
from furiosa_build.runtime.engine_args import AsyncEngineArgs

API_KEYS_VARIABLE = "FURIOSA_API_KEYS"
MIB = 1024 * 1024


class ServerOptions(BaseModel):
    """The options of `serve`, apart from the artifact. The names are those of the options and of the YAML file's keys.

    Those that AsyncEngineArgs has as well are given to it; None stands for what the artifact prefers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    host: str = Field("127.0.0.1", description="The address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="The port to listen on; 0 takes a free one, and says which.")
    root_path: str = Field("", description="The path that a proxy in front puts the server under.")
    timeout_keep_alive: int = Field(5, ge=0, description="Seconds until an idle connection is closed.")
    served_model_name: str | None = Field(None, description="The model's name in requests. (default: the artifact's)")

    public_key: engine_options.PublicKey | None = None
    tokenizer: engine_options.Tokenizer | None = None
    seed: engine_options.Seed | None = None
    devices: engine_options.Devices | None = None
    tensor_parallel_size: engine_options.TensorParallelSize | None = None
    pipeline_parallel_size: engine_options.PipelineParallelSize | None = None
    data_parallel_size: engine_options.DataParallelSize | None = None
    paged_attention_num_blocks: engine_options.PagedAttentionNumBlocks | None = None
    npu_queue_limit: engine_options.NpuQueueLimit | None = None
    max_processing_samples: engine_options.MaxProcessingSamples | None = None
    spare_blocks_ratio: engine_options.SpareBlocksRatio | None = None
    is_offline: engine_options.IsOffline | None = None
    prefill_chunk_size: engine_options.PrefillChunkSize | None = None
    enable_prefix_caching: engine_options.EnablePrefixCaching = True
    num_threads: engine_options.NumThreads | None = None
    pin_threads: engine_options.PinThreads = False

    num_speculative_tokens: engine_options.NumSpeculativeTokens | None = None
    use_speculative_decoding_if_possible: engine_options.UseSpeculativeDecoding = True
    speculative_model_paged_attention_num_blocks: engine_options.DraftNumBlocks | None = None

    api_key_file: str | None = Field(
        None, description=f"File of API keys, one a line. Or in the variable {API_KEYS_VARIABLE}, by commas."
    )
    ssl_certfile: str | None = Field(None, description="PEM file of the certificate, for https.")
    ssl_keyfile: str | None = Field(None, description="PEM file of its private key.")
    cors_origins: list[str] = Field([], description="Origins whose pages may call the server, by commas; * for all.")

    max_body_bytes: ByteSize = Field(
        ByteSize(4 * MIB), ge=1, description="Larger bodies, in bytes or such as 4MiB, are refused with 413."
    )
    strict_requests: bool = Field(False, description="Whether fields that are not known are refused with 400.")
    generation_config: str = Field(
        "auto",
        description="Where requests' sampling defaults come from: auto, the artifact's generation_config.json; vllm, "
        "none; or a directory with such a file.",
    )
    max_prompt_tokens: int | None = Field(None, ge=1, description="Longer prompts are refused with 400.")
    max_requests_in_flight: int = Field(256, ge=1, description="Further requests are refused with 429.")
    request_timeout_s: float = Field(600.0, gt=0, description="Seconds that a request may take; then 408.")
    drain_timeout_s: float = Field(30.0, ge=0, description="Seconds after SIGTERM until requests are cut.")
    log_prompts: bool = Field(False, description="Whether prompts are logged.")

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Self:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile belong together")
        return self

    def engine_args(self, artifact: str | Path) -> AsyncEngineArgs:
        """The arguments of an engine for an artifact. Options that are None leave it what the artifact prefers."""
        given = {name: getattr(self, name) for name in _ENGINE if getattr(self, name) is not None}
        return AsyncEngineArgs(model=str(artifact), **given)

    def api_keys(self) -> tuple[str, ...]:
        """The keys of file and environment; none: everybody may use the server. Raises UserError."""
        keys = os.environ.get(API_KEYS_VARIABLE, "").split(",")
        if self.api_key_file is not None:
            try:
                keys += Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError) as error:
                raise UserError(f"the API keys cannot be read: {error}", where="api_key_file") from error
        found = tuple(key.strip() for key in keys if key.strip())
        if self.api_key_file is not None and not found:  # it would be open to everybody
            raise UserError(f"{self.api_key_file} has no API key", where="api_key_file", valid="one a line")
        return found


_ENGINE = ServerOptions.model_fields.keys() & {each.name for each in fields(AsyncEngineArgs)}


def from_command_line(given: Mapping[str, str], file: Path | None = None) -> ServerOptions:
    """The options that are given as texts, which go before those of the YAML file. Raises UserError."""
    from_file = {} if file is None else _read(file)
    if file is not None:
        _validated(from_file, strict=True, where=str(file))
    values = {name: text.split(",") if name == "cors_origins" else text for name, text in given.items()}
    return _validated(from_file | values, strict=False, where="command line")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"the server configuration cannot be read: {error}", where=str(path)) from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} is not a mapping of options", where=str(path), valid="lines such as port: 8000")
    return content


def _validated(values: dict[str, Any], *, strict: bool, where: str) -> ServerOptions:
    try:
        return ServerOptions.model_validate(values, strict=strict)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=True)[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            hint = nearest(name, ServerOptions.model_fields)
            raise UserError(f"there is no option {name!r}", where=where, hint=hint) from error
        found = f"{name}={first['input']!r}: " if name else ""
        raise UserError(f"{found}{first['msg']}", where=where) from error
