"""What a user of transformers gets from a model's source: its tokenizer and its model, by `from_pretrained` alone.

Which file is read, what its tensors are called and which are tied is transformers' decision.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.core.errors import StepError
from furiosa_build.steps.qualification.reference import Asked, Expected
from furiosa_build.weights.hf_layout import TOKENIZER_VOCABULARIES, matches

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

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

    def model(self) -> OriginalModel:
        """Its model. Raises StepError when transformers cannot load it."""
        return OriginalModel(self.directory)


class OriginalTokenizer:
    """The tokenizer of a directory, by transformers."""

    def __init__(self, directory: Path, name: str | None) -> None:
        from transformers import AutoConfig, AutoTokenizer

        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        with _quietly(), _loading("tokenizer"):
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
        with _quietly():
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


class OriginalModel:
    """The model of a directory, by transformers. Weights that are used as they are stored are mapped."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        with _quietly(), _loading("model"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        self.model: PreTrainedModel = loaded[0]
        if missing := sorted(loaded[1]["missing_keys"]):
            what = f"the source has no weights for {', '.join(missing[:3])}{', ...' if missing[3:] else ''}"
            raise StepError("qualify", f"{what}: transformers would draw {len(missing)} parameters at random")
        self.model.eval().requires_grad_(False)
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @property
    def dtype(self) -> str:
        """What it computes in, such as `bfloat16`."""
        return str(self.model.dtype).removeprefix("torch.")

    def linear(self, name: str) -> nn.Linear:
        """The linear layer whose weight has this name. Raises StepError when the model has none."""
        from torch import nn

        path = name.removesuffix(".weight")
        inside = dict(self.model.get_decoder().named_modules())  # of a model that takes images too, the text's part
        module = dict(self.model.named_modules()).get(path, inside.get(path.partition(".")[2]))
        if not isinstance(module, nn.Linear):
            raise StepError("qualify", f"the source's model, as transformers loads it, has no linear layer {name}")
        return module

    def best_beam(self, prompt: Sequence[int], new: int, width: int) -> float:
        """The sum of log probabilities of the best beam of `new` tokens after a prompt."""
        import torch

        with _quietly():
            generate: Any = self.model.generate
            found = generate(
                torch.tensor([list(prompt)]),
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
                do_sample=False,
                num_beams=width,
                max_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
                length_penalty=0.0,
                output_scores=True,
                return_dict_in_generate=True,
            )
        return float(found.sequences_scores[0])

    def logits(self, asked: Sequence[Asked]) -> list[Expected]:
        """The logits of several sequences."""
        return [Expected(logits, logits) for logits in map(self.logits_of, asked)]

    def logits_of(self, asked: Asked) -> Tensor:
        """Logits of what follows the tokens at these positions: float32 [positions, vocab].

        The sequence is alone in its batch: no other one, and no padding, can have a part in them.
        """
        import torch

        tokens, after = asked
        options = {"logits_to_keep": after} if self._keeps else {}
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=tokens[None], use_cache=False, **options).logits[0]
        return (logits if self._keeps else logits[after]).float()


@contextmanager
def _loading(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise StepError("qualify", f"transformers cannot load the {what} of the source: {reason}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without progress bars and advice of transformers."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
