"""A model's tokenizer as transformers loads it, written as `tokenizers` and jinja2 alone can read it.

transformers makes a tokenizer of many files, by rules that depend on the model's type. What it has made is written
down: tokenizer.json, the named tokens, and the chat templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.core.errors import UserError

CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"

_WITHOUT = "model.tokenizer=none builds an artifact that takes and gives token ids"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_HOW_TO_DECODE = (
    "split_special_tokens",
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
)
_TEMPLATE_NAME = re.compile(r"\w[\w.-]*")


def load(directory: Path, name: str, config: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that `AutoTokenizer` gives.

    Args:
        directory: The tokenizer's files. The config is written there.
        name: The model's, for messages.
        config: The fields of config.json that choose the tokenizer's class; and for a model of the hub `_name_or_path`,
            as transformers knows some by their names.

    Raises:
        UserError: transformers cannot load it, or runs it in Python.
    """
    (directory / "config.json").write_text(json.dumps(dict(config)))
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        known = AutoConfig.from_pretrained(directory, **options)
    except (ValueError, OSError):  # a type that transformers does not know: AutoTokenizer goes by the files then
        pass
    else:
        known._name_or_path = config.get("_name_or_path", "")
        options["config"] = known
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    except Exception as error:  # whatever a file of the wrong form makes transformers raise
        raise _refusal(name, directory, error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"transformers runs the tokenizer of {name}, {type(tokenizer).__name__}, in Python",
            where="tokenizer_config.json",
            valid="a tokenizer that the tokenizers library can run",
            hint=_WITHOUT,
        )
    return tokenizer


def write(tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat templates.

    Raises UserError for a template whose name is not one of a file.
    """
    fast = tokenizer.backend_tokenizer
    fast.no_truncation()
    fast.no_padding()
    (output / "tokenizer.json").write_text(fast.to_str(pretty=True), encoding="utf-8")
    tokens = tokenizer.special_tokens_map
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: tokens.pop(key, None) for key in _NAMED},
        **({"model_specific_special_tokens": tokens} if tokens else {}),
        "extra_special_tokens": tokenizer.extra_special_tokens,
        **{key: bool(getattr(tokenizer, key)) for key in _HOW_TO_DECODE},
        "model_max_length": tokenizer.model_max_length,
    }
    (output / "tokenizer_config.json").write_bytes(canonical_json(described))
    templates = tokenizer.chat_template or {}
    for key, template in ({"default": templates} if isinstance(templates, str) else templates).items():
        if not _TEMPLATE_NAME.fullmatch(key):
            raise UserError(f"{key!r} is not a name for a chat template", where="tokenizer_config.json, chat_template")
        path = output / (CHAT_TEMPLATE if key == "default" else f"{MORE_TEMPLATES}/{key}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(template.encode())


def ids_beyond(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> dict[str, int]:
    """The tokens with ids of `vocab_size` and more, by id."""
    beyond = {token: id_ for token, id_ in tokenizer.get_vocab().items() if id_ >= vocab_size}
    return dict(sorted(beyond.items(), key=lambda item: item[1]))


def _refusal(name: str, directory: Path, error: Exception) -> UserError:
    """Why transformers cannot load the tokenizer, as far as can be told."""
    said = str(error).replace(f"{directory}/", "").strip()
    reason, hint = said.split("\n")[0] or type(error).__name__, _WITHOUT
    pieces = sorted(path.name for path in directory.glob("*.model*"))
    if "trust_remote_code" in str(error):
        reason = "it is code of the model's own, which is never executed"
    elif pieces and (missing := [each for each in ("sentencepiece", "tiktoken") if find_spec(each) is None]):
        reason = f"to read {', '.join(pieces)} it takes {' or '.join(missing)}, not installed"
        hint = f"pip install 'furiosa-build[tokenizers]'; or {_WITHOUT}"
    elif "instantiate the backend tokenizer" in str(error):
        files = ", ".join(sorted(path.name for path in directory.iterdir() if path.name != "config.json"))
        reason = f"the class that tokenizer_config.json or config.json names reads none of {files}"
    return UserError(
        f"transformers cannot load the tokenizer of {name}: {reason}", where="the model's tokenizer files", hint=hint
    )
