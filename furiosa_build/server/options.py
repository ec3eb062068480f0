"""What a server can be told: by options of the command line, by a YAML file, or by both."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from furiosa_build.core.errors import UserError, nearest
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

    public_key: str | None = Field(None, description="PEM file of the key that the artifact must be signed with.")
    tokenizer: str | None = Field(None, description="Directory with the files of another tokenizer.")
    seed: int | None = Field(None, description="Of requests that have none of their own. (default: drawn)")
    devices: str | None = Field(None, description="What to run on, such as cpu or npu:0:0-3.")
    tensor_parallel_size: int | None = Field(None, description="Ranks of a stage; fixed when an artifact is built.")
    pipeline_parallel_size: int | None = Field(None, description="Stages that the layers are divided among.")
    data_parallel_size: int | None = Field(None, description="Copies of the model.")
    paged_attention_num_blocks: int | None = Field(None, description="KV blocks of a layer.")
    npu_queue_limit: int | None = Field(None, description="Batches under way at a time.")
    max_processing_samples: int | None = Field(None, description="Texts generated at a time, waiting ones included.")
    spare_blocks_ratio: float | None = Field(None, description="Share of the KV blocks kept for requests that run.")
    is_offline: bool | None = Field(None, description="Whether only the time until all are finished counts.")
    prefill_chunk_size: int | None = Field(None, description="Most tokens of a prompt that run at once.")
    enable_prefix_caching: bool = Field(True, description="Whether requests share the KV blocks of equal beginnings.")

    num_speculative_tokens: int | None = Field(None, description="Tokens that the draft proposes at a time.")
    use_speculative_decoding_if_possible: bool = Field(True, description="Whether to use the artifact's draft.")
    speculative_model_paged_attention_num_blocks: int | None = Field(None, description="KV blocks of the draft.")

    api_key_file: str | None = Field(
        None, description=f"File of API keys, one a line. Or in the variable {API_KEYS_VARIABLE}, by commas."
    )
    ssl_certfile: str | None = Field(None, description="PEM file of the certificate, for https.")
    ssl_keyfile: str | None = Field(None, description="PEM file of its private key.")
    cors_origins: list[str] = Field([], description="Origins whose pages may call the server, by commas; * for all.")

    max_body_bytes: int = Field(4 * MIB, ge=1, description="Larger bodies are refused with 413.")
    max_prompt_tokens: int | None = Field(None, ge=1, description="Longer prompts are refused with 400.")
    max_requests_in_flight: int = Field(256, ge=1, description="Further requests are refused with 429.")
    request_timeout_s: float = Field(600.0, gt=0, description="Seconds that a request may take; then 408.")
    drain_timeout_s: float = Field(30.0, ge=0, description="Seconds after SIGTERM until requests are cut.")
    log_prompts: bool = Field(False, description="Whether prompts stand in the log.")

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Self:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile belong together")
        return self

    def engine_args(self, artifact: str | Path) -> AsyncEngineArgs:
        """Those that concern the engine."""
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


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Adds an option for every field, and `--server-config` for a file of them. An option goes before the file."""
    parser.add_argument("--server-config", metavar="FILE", help="YAML file with the names of these options as keys.")
    for name, field in ServerOptions.model_fields.items():
        default = "" if field.default in (None, "", []) else f" (default: {field.default})"
        parser.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            default=argparse.SUPPRESS,
            help=((field.description or "") + default).replace("%", "%%"),
            type=_by_commas if name == "cors_origins" else str,
        )


def _by_commas(text: str) -> list[str]:
    return text.split(",")


def from_cli_args(arguments: argparse.Namespace) -> ServerOptions:
    """The options of a parsed command line and of its `--server-config`. Raises UserError."""
    file = arguments.server_config
    given = {name: value for name, value in vars(arguments).items() if name in ServerOptions.model_fields}
    from_file = {} if file is None else _read(Path(file))
    if file is not None:
        _validated(from_file, strict=True, where=file)
    # Texts of the command line, so not strictly.
    return _validated(from_file | given, strict=False, where="command line")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"the server configuration cannot be read: {error}", where=str(path)) from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} is no mapping of options", where=str(path), valid="lines such as port: 8000")
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
