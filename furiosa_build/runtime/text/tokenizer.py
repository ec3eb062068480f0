"""Text to tokens and back: all from the artifact's model/ directory, which the build has written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.text.chat_template import ChatTemplates, Message
from furiosa_build.runtime.text.config_files import named_tokens, read_config, read_json, templates, tokens_to_add
from furiosa_build.runtime.text.token_bytes import TokenBytes

CLEANED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
"""Spaces that tokenizers of some older models leave out of a text (`clean_up_tokenization_spaces`)."""


class Tokenizer:
    """The tokenizer of an artifact.

    Args:
        model_directory: Has tokenizer.json and, as far as there are any, tokenizer_config.json and chat templates. Of
            a directory that no build has written, added_tokens.json and special_tokens_map.json count too.

    Attributes:
        special_tokens: The texts of special tokens, by id.
        cleans_up: `decode` leaves out some spaces.

    Raises:
        UserError: A file cannot be read.
    """

    def __init__(self, model_directory: Path) -> None:
        self._directory = model_directory
        path = model_directory / "tokenizer.json"
        try:
            self._fast: FastTokenizer = FastTokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(f"{path} is not a tokenizer: {error}", where=str(path)) from error
        self._fast.no_truncation()
        self._fast.no_padding()
        self._config = read_config(model_directory)
        self._fast.add_tokens(list(tokens_to_add(self._config, self._fast.get_added_tokens_decoder())))
        self._fast.encode_special_tokens = bool(self._config.get("split_special_tokens"))
        added = self._fast.get_added_tokens_decoder().items()
        self.special_tokens = {id_: token.content for id_, token in added if token.special}
        self.cleans_up = bool(self._config.get("clean_up_tokenization_spaces")) and (
            not isinstance(self._fast.model, BPE)
            or bool(self._config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"))
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, by default with those that the tokenizer puts around every text."""
        return list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        text = str(self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens))
        if self.cleans_up:
            for before, after in CLEANED:
                text = text.replace(before, after)
        return text

    def token(self, id_: int) -> str | None:
        """What the vocabulary calls a token; None: it has none with this id."""
        return self._fast.id_to_token(id_) if 0 <= id_ < 1 << 32 else None

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes that each token stands for."""
        return TokenBytes(self._fast)

    def to_json(self) -> str:
        """The tokenizer as tokenizer.json holds it."""
        return str(self._fast.to_str())

    @cached_property
    def chat_templates(self) -> ChatTemplates:
        """The chat templates."""
        return ChatTemplates(templates(self._directory, self._config), named_tokens(self._config))

    @property
    def description(self) -> dict[str, Any]:
        """What tokenizer_config.json says: named tokens as their texts; with the chat template, if there is one."""
        template = templates(self._directory, self._config).get("default")
        named = {**self._config, **named_tokens(self._config)}
        return named if template is None else {**named, "chat_template": template}

    def apply_chat_template(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> str:
        """The prompt for a conversation; options as `ChatTemplates.render`.

        It has its special tokens in it: encode it without adding any.

        Raises:
            UserError: The artifact has no chat template, or the template rejects the messages.
        """
        return self.chat_templates.render(messages, tools=tools, **options)


def end_of_sequence_ids(model_directory: Path, hf_config: Mapping[str, Any]) -> frozenset[int]:
    """The model's end-of-sequence tokens: generation_config.json says so, else config.json."""
    for config in (read_json(model_directory / "generation_config.json"), hf_config):
        ids = config.get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, Iterable) else [ids])
    return frozenset()
