"""The source's model as transformers loads it by `from_pretrained` alone: whole, or one layer at a time.

Which file is read, what its tensors are called, how they are converted and which are tied is transformers' decision.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.core.errors import StepError
from furiosa_build.steps.qualification.held_back import LayersHeldBack
from furiosa_build.steps.qualification.layers import Layers
from furiosa_build.steps.qualification.nudges import Nudges
from furiosa_build.steps.qualification.reference import Asked, Expected
from furiosa_build.steps.qualification.text_part import place_of, place_of_layers
from furiosa_build.steps.qualification.transformers_calls import loading, quietly

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class OriginalModel:
    """The model of a directory, whole. Weights that are used as they are stored are mapped.

    Args:
        directory: That of the source.
        layers: Where its decoder layers are: `model.layers`.

    Attributes:
        model: transformers' model.
    """

    is_whole = True

    def __init__(self, directory: Path, layers: str) -> None:
        from transformers import AutoModelForCausalLM

        with quietly(), loading("model"):
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
        self._nudges = Nudges(self.model.get_submodule(place_of_layers(self.model, layers)).children())
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @property
    def dtype(self) -> str:
        """What it computes in, such as `bfloat16`."""
        return str(self.model.dtype).removeprefix("torch.")

    def weighted(self, name: str) -> nn.Linear | nn.Embedding:
        """The layer whose weight has this name. Raises StepError when the model has none."""
        from torch import nn

        place = place_of(self.model, name.removesuffix(".weight"))
        module = None if place is None else self.model.get_submodule(place)
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise StepError("qualify", f"the source's model, as transformers loads it, has no linear layer {name}")
        return module

    def name_of(self, name: str) -> str | None:
        """What a parameter of the language model is called here; None: it is none of this model's."""
        path, _, leaf = name.rpartition(".")
        place = place_of(self.model, path)
        return None if place is None else f"{place}.{leaf}"

    def is_of_text(self, name: str) -> bool:
        """Whether a parameter is the decoder's or the head's, and not of what takes images or sound."""
        module = self.model.get_submodule(name.rpartition(".")[0])
        inside = self.model.get_decoder().modules()
        return module is self.model.get_output_embeddings() or any(module is each for each in inside)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Its parameters, and buffers that are stored, under all their names.

        Those of a layer are there until the next is asked for.
        """
        yield from self.model.state_dict(keep_vars=True).items()

    def best_beam(self, prompt: Sequence[int], new: int, width: int) -> float:
        """The sum of log probabilities of the best beam of `new` tokens after a prompt."""
        import torch

        with quietly():
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
        return [Expected(logits, logits) for logits in self.run(asked)]

    def nudged(self, asked: Sequence[Asked]) -> list[list[Tensor]]:
        """The logits of several sequences, of each several times, as if the model rounded otherwise."""
        return self._nudges.runs(self.run, asked)

    def run(self, asked: Sequence[Asked]) -> list[Tensor]:
        """Logits of what follows the tokens at these positions: float32 [positions, vocab] of each sequence.

        A sequence is alone in its batch: no other one, and no padding, can have a part in them.
        """
        return [self._run(each) for each in asked]

    def _run(self, asked: Asked) -> Tensor:
        import torch

        tokens, after = asked
        options = {"logits_to_keep": after} if self._keeps else {}
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=tokens[None], use_cache=False, **options).logits[0]
        return (logits if self._keeps else logits[after]).float()


class LayeredOriginalModel(OriginalModel):
    """The same of which one layer at a time is in memory: transformers loads each when it is needed."""

    is_whole = False

    def __init__(self, directory: Path, layers: str) -> None:
        held_back = LayersHeldBack(layers)
        with held_back.at_loading():
            super().__init__(directory, layers)
        self._layers = Layers(self.model, held_back.place, held_back.load)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        outside = {name: tensor for name, tensor in super().parameters() if not tensor.is_meta}
        yield from outside.items()
        for number in range(len(self._layers)):
            with self._layers.loaded(number):
                there = ((name, tensor) for name, tensor in super().parameters() if not tensor.is_meta)
                yield from ((name, tensor) for name, tensor in there if name not in outside)

    def run(self, asked: Sequence[Asked]) -> list[Tensor]:
        return self._layers.logits(asked)
