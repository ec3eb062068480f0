"""The files of a model's directory in Hugging Face layout."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from furiosa_build.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
WEIGHT_PATTERNS = ("model*.safetensors", INDEX_FILE)
"""Of the hub's files: some repositories hold the weights a second time, under names such as `consolidated`."""
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What travels into the artifact's model/ directory."""


def list_files(directory: Path) -> list[Path]:
    """The files that count, sorted."""
    found = {path for pattern in (*WEIGHT_PATTERNS, *MODEL_FILES) for path in directory.glob(pattern)}
    with suppress(UserError):
        found.update(directory / name for name in weight_files(directory))
    return sorted(path for path in found if path.is_file())


def weight_files(directory: Path) -> list[str]:
    """Names of a directory's weight files. Raises UserError when one is missing or named outside the directory."""
    index = directory / INDEX_FILE
    if not index.is_file():
        if not (directory / "model.safetensors").is_file():
            raise UserError(
                "the model's directory has no weights",
                where=str(directory),
                valid=f"model.safetensors, or shards with {INDEX_FILE}",
            )
        return ["model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{INDEX_FILE} is no index of safetensors files: {error!r}", where=str(index)) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{INDEX_FILE} names a file outside its directory: {name!r}", where=str(index))
        if not (directory / name).is_file():
            raise UserError(f"weight file {name} is missing", where=str(directory), hint=f"{INDEX_FILE} lists it")
    return names
