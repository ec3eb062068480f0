"""The files of a model's directory in Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from furiosa_build.core.errors import UserError
from furiosa_build.core.python_floats import without_floats

WHOLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_PATTERNS = ("model*.safetensors", INDEX_FILE)
"""The weight files of the hub that are used: some repositories hold them twice, also as `consolidated` or so."""
TOKENIZER_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.*.json",
    "tokenizer.model*",
    "tiktoken.model",
    "spiece.model",
    "spm.model",
    "sentencepiece*.model",
    "tekken.json",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
)
"""Files of a tokenizer, one of which holds its vocabulary: as `tokenizers`, SentencePiece, tiktoken, Mistral or the
older classes of transformers write them."""
TOKENIZER_FILES = (
    *TOKENIZER_VOCABULARIES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
"""All files that transformers makes a tokenizer of."""
TRAVELLING = ("generation_config.json",)
"""Files that travel into the artifact's model/ directory as they are."""
MODEL_FILES = ("config.json", *TRAVELLING, *TOKENIZER_FILES)
"""What a model has beside its weights, as far as it is used."""
ORIGINAL_PATTERNS = (*MODEL_FILES, *WEIGHT_PATTERNS, "adapter_config.json", "adapter_model*")
"""What transformers may open of a model with safetensors weights."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = (*_PICKLES, ".safetensors", ".gguf", ".msgpack", ".h5")
_CONVERT = 'python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained(OLD).save_pretrained(NEW)"'

LARGEST_JSON = 64 << 20
"""Bytes of a file that is only copied. The largest tokenizers have about 35 MB."""
LARGEST_PARSED = {
    "config.json": 1 << 20,
    "generation_config.json": 1 << 20,
    "tokenizer_config.json": 16 << 20,
    INDEX_FILE: 32 << 20,
}
"""Bytes of files that are parsed, here or by the runtime: that may take 30 times as much memory. Real configs have less
than 100 kB, those of tokenizers about 1 MB; the index of a model with hundreds of experts has 15 MB."""


def weight_files(directory: Path, named: str | None = None) -> list[str]:
    """Names of a directory's weight files, and of their index if it counts, as transformers chooses them.

    A whole file goes before shards, and one that config.json names (`named`: its `transformers_weights`) before both.
    Raises UserError when one is missing or named outside the directory.
    """
    if named is not None:
        return _named_files(directory, named)
    if (directory / WHOLE_FILE).is_file():
        return [WHOLE_FILE]
    if not (directory / INDEX_FILE).is_file():
        raise no_weights(str(directory), [path.name for path in directory.iterdir()] if directory.is_dir() else [])
    return [*_shards(directory / INDEX_FILE), INDEX_FILE]


def no_weights(where: str, names: Sequence[str]) -> UserError:
    """The error for a model of whose files none is a safetensors file of a name that transformers looks for."""
    others = sorted(name for name in names if name.endswith(_WEIGHTS))
    pickled = [name for name in others if Path(name).suffix in _PICKLES]
    what, hint = "the model's directory has no weights", ""
    if pickled:
        what = f"the weights are pickles ({pickled[0]}), which are never loaded: a pickle can run any code"
        hint = f"convert them where you trust them: {_CONVERT}"
    elif others:
        what = f"the model's directory has no weights of the names that transformers loads, but {', '.join(others[:3])}"
        hint = "rename the file, or name it by model.param_file_path"
    return UserError(what, where=where, valid=f"{WHOLE_FILE}, or shards with {INDEX_FILE}", hint=hint)


def _named_files(directory: Path, named: str) -> list[str]:
    path = directory / Path(str(named)).name
    if path.name != named or not path.is_file() or not named.endswith((".safetensors", INDEX_FILE[5:])):
        raise UserError(
            f"config.json names its weights {named!r}, which is not a safetensors file of its directory",
            where=f"{directory / 'config.json'}, transformers_weights",
            valid="the name of a .safetensors file, or of its index, beside config.json",
        )
    return [named] if named.endswith(".safetensors") else _shards(path)


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    directory = index.parent
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{INDEX_FILE} is not an index of safetensors files: {error!r}", where=str(index)) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{INDEX_FILE} names a file outside its directory: {name!r}", where=str(index))
        if not (directory / name).is_file():
            raise UserError(f"weight file {name} is missing", where=str(directory), hint=f"{INDEX_FILE} lists it")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the model. Raises UserError unless it is one, and one that `check_file` passes."""
    check_file(path)
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is not readable JSON: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise UserError(f"{path.name} does not hold a JSON object", where=str(path))
    return without_floats(data)  # type: ignore[no-any-return]


def find_files(directory: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """The files of a model's directory that match, by name. Raises UserError for one that `check_file` refuses."""
    found = {path.relative_to(directory).as_posix(): path for pattern in patterns for path in directory.glob(pattern)}
    files = {name: path for name, path in sorted(found.items()) if path.is_file()}
    for path in files.values():
        check_file(path, directory)
    return files


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file of this name is one of those."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_file(path: Path, root: Path | None = None) -> None:
    """Raises UserError for a file (not one of weights) that is too large, or a link that leads out of the directory.

    Such a file would end up in the artifact. In the hub's cache a snapshot's files are links to its blobs.

    Args:
        path: The file.
        root: The model's directory; None: the file's own.
    """
    if not path.is_file():
        return
    directory, target = (root or path.parent).resolve(), path.resolve()
    homes = [directory, *([directory.parent.parent / "blobs"] if directory.parent.name == "snapshots" else [])]
    if not any(target.is_relative_to(home) for home in homes):
        raise UserError(
            f"{path.name} is a link out of the model's directory, to {target}",
            where=str(path),
            hint="put a copy of the file there, if it belongs to the model",
        )
    size = target.stat().st_size
    largest = LARGEST_PARSED.get(path.name, LARGEST_JSON)
    if size > largest:
        raise UserError(f"{path.name} has {size} bytes", where=str(path), valid=f"at most {largest}")
