"""What the files beside tokenizer.json say: named tokens, tokens to be added, chat templates.

In an artifact these are tokenizer_config.json and the templates, which the build has written. In another directory
(`--tokenizer`) special_tokens_map.json and added_tokens.json may say more, and tokenizer.json may lack tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from furiosa_build.core.errors import UserError

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one if there is no file. Raises UserError for anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is invalid JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object", where=str(path))
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what older files have instead of its `added_tokens_decoder`."""
    config = read_json(directory / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    config |= read_json(directory / "special_tokens_map.json")
    names = {_content(token) for token in (*named_tokens(config).values(), *_extra(config))}
    added = read_json(directory / "added_tokens.json")
    return config | {
        "added_tokens_decoder": {
            id_: {"content": token, "special": token in names, "normalized": token not in names}
            for token, id_ in added.items()
        }
    }


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that chat templates write by name; without those that are null."""
    extra = config.get("extra_special_tokens")
    named = {
        **{key: value for key, value in config.items() if key.endswith("_token")},
        **(extra if isinstance(extra, dict) else {}),
        **config.get("model_specific_special_tokens", {}),
    }
    contents = {key: _content(value) for key, value in named.items()}
    return {key: content for key, content in contents.items() if isinstance(content, str)}


def tokens_to_add(config: Mapping[str, Any], known: Mapping[int, AddedToken]) -> Iterator[AddedToken]:
    """The tokens that a tokenizer with the added tokens `known` lacks, in the order in which they get their ids."""
    present = {token.content for token in known.values()}
    special = set(named_tokens(config).values())
    for id_, token in sorted((int(id_), token) for id_, token in config.get("added_tokens_decoder", {}).items()):
        found = _added(token, special=token.get("special", False) or token["content"] in special)
        if id_ not in known or _flags(known[id_]) != _flags(found):
            present.add(found.content)
            yield found
    for token in (*(config.get(key) for key in _STANDARD), *named_tokens(config).values(), *_extra(config)):
        content = _content(token)
        if isinstance(content, str) and content not in present:
            present.add(content)
            yield _added(token, special=True)


def templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name. Files come before what tokenizer_config.json has."""
    more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    default = directory / "chat_template.jinja"
    files = {"default": default} if default.is_file() else {}
    files |= {path.name.removesuffix(".jinja"): path for path in more}
    if files:
        return {name: path.read_bytes().decode(errors="replace") for name, path in files.items()}
    given = config.get("chat_template")
    if isinstance(given, list):
        return {entry["name"]: entry["template"] for entry in given}
    return {"default": given} if isinstance(given, str) else {}


def _extra(config: Mapping[str, Any]) -> list[Any]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return list(extra.values()) if isinstance(extra, dict) else list(extra)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _added(token: Any, special: bool) -> AddedToken:
    flags = {name: token[name] for name in _FLAGS if name in token} if isinstance(token, dict) else {}
    return AddedToken(_content(token), **{**flags, "special": special})


def _flags(token: AddedToken) -> tuple[Any, ...]:
    return token.content, *(getattr(token, name) for name in _FLAGS)
