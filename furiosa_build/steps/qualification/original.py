"""What a user of transformers finds in a model's source: its files, and its tokenizer by `from_pretrained` alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.steps.qualification.transformers_calls import loading, quietly
from furiosa_build.weights.hf_layout import TOKENIZER_VOCABULARIES, matches

if TYPE_CHECKING:
    from furiosa_build.runtime.probe import Chat

_ABOUT_FILES = ("transformers_weights",)
"""Fields of config.json that say which files are read."""


class Original:
    """The source as its user has it: a directory of links to its files.

    Args:
        files: They, by name.
        directory: To be made.
        changed: The fields of config.json as the recipe changes them; None: it does not.
        name: What the model is called on the hub, if it is there: transformers knows some tokenizers by that.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        directory: Path,
        changed: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        self.directory, self._name = directory, name
        directory.mkdir()
        for file, path in files.items():
            (directory / file).parent.mkdir(exist_ok=True)
            (directory / file).symlink_to(path.absolute())
        if changed is not None:
            config = directory / "config.json"
            own = json.loads(config.read_bytes()) if config.exists() else {}
            kept = {key: own[key] for key in _ABOUT_FILES if key in own}
            config.unlink(missing_ok=True)
            config.write_text(json.dumps({**kept, **changed}))
        self._has_tokenizer = any(matches(file, TOKENIZER_VOCABULARIES) for file in files)

    def tokenizer(self) -> OriginalTokenizer | None:
        """Its tokenizer; None if it has none. Raises StepError when transformers cannot load it."""
        return OriginalTokenizer(self.directory, self._name) if self._has_tokenizer else None


class OriginalTokenizer:
    """The tokenizer of a directory, by transformers."""

    def __init__(self, directory: Path, name: str | None) -> None:
        from transformers import AutoConfig, AutoTokenizer

        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        with quietly(), loading("tokenizer"):
            if name is not None:
                options["config"] = AutoConfig.from_pretrained(directory, **options)
                options["config"]._name_or_path = name
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, **options)

    def named(self, most: int) -> list[str]:
        """Tokens that are special, or were added: the first and the last of them."""
        added = [str(token.content) for _, token in sorted(self._tokenizer.added_tokens_decoder.items())]
        found = list(dict.fromkeys([*self._tokenizer.all_special_tokens, *added]))
        return found if len(found) <= most else [*found[: most // 2], *found[-(most // 2) :]]

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; with `special`, those around every text too."""
        with quietly():
            return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def piece(self, token: int) -> str:
        """What a token is called in the vocabulary."""
        return str(self._tokenizer.convert_ids_to_tokens(token))

    def render(self, chat: Chat) -> str | None:
        """The prompt of a conversation; None where the template refuses it, or there is none."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    chat.messages,
                    tools=chat.tools,
                    add_generation_prompt=chat.add_generation_prompt,
                    tokenize=False,
                )
            )
        except Exception:  # a template is a program, and fails in as many ways
            return None
