"""tokenizer: the tokenizer of an artifact, made by transformers of all the files that the model has. It runs before
there is a plan, as the survey does: what cannot be used is refused then."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from furiosa_build.ir.tokenizer import TokenizerOutline
from furiosa_build.steps.base import Inputs, Job, Request

OUTLINE = "outline.json"
FILES = "tokenizer/"
"""What the names of the artifact's files begin with among the outputs."""


class TokenizerRequest(Request):
    """The tokenizer's files, which are the inputs, and what else decides what transformers makes of them.

    Attributes:
        name: The model's name.
        config: The fields of config.json that choose the tokenizer's class.
        vocab_size: How many tokens the model has embeddings for.
    """

    name: str
    config: dict[str, Any]
    vocab_size: int


class Tokenizer(Job[TokenizerRequest]):
    """Writes outline.json, and tokenizer/: the files for an artifact."""

    name = "tokenizer"
    Request = TokenizerRequest
    packages = ("transformers", "tokenizers")
    optional_packages = ("sentencepiece", "tiktoken")

    def run(self, request: TokenizerRequest, inputs: Inputs, output: Path) -> None:
        from furiosa_build.models import tokenizer

        with tempfile.TemporaryDirectory() as temporary:
            source = Path(temporary)
            for name, path in inputs.files.items():
                (source / name).parent.mkdir(exist_ok=True)
                (source / name).symlink_to(path)
            made = tokenizer.load(source, request.name, request.config)
        files = output / FILES
        files.mkdir()
        tokenizer.write(made, files)
        beyond = tokenizer.ids_beyond(made, request.vocab_size)
        outline = TokenizerOutline(num_tokens=len(made), beyond_vocabulary=beyond)
        (output / OUTLINE).write_text(outline.model_dump_json())
