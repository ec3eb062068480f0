"""The form of a quantized weight: how a checkpoint stores it, and what its layer does to its input.

Steps and keys have a form as text: `fp8` and `int8`, which recipes make, and such as `int8-plain-tensor-dynamic`, which
only come from elsewhere.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

_WORDS = ("plain", "tensor", "dynamic")


class Form(NamedTuple):
    """A quantized weight, as compressed-tensors has it: symmetric, 8 bits.

    Attributes:
        kind: `fp8` is float8_e4m3fn.
        plain: Of int8: stored as int8, a number each; else packed by four into int32, as value + 128.
        tensor: One scale for the whole weight; else one for each output channel.
        dynamic: The layer rounds its input to the same kind, with a scale for each token, found as it runs.
    """

    kind: Literal["fp8", "int8"]
    plain: bool = False
    tensor: bool = False
    dynamic: bool = False

    @classmethod
    def parse(cls, text: str) -> Form:
        """The form that `str` has made text of."""
        kind, *words = text.split("-")
        return cls(cast('Literal["fp8", "int8"]', kind), *(word in words for word in _WORDS))

    def __str__(self) -> str:
        return "-".join([self.kind, *(word for word, is_so in zip(_WORDS, self[1:], strict=True) if is_so)])

    @property
    def is_packed(self) -> bool:
        """Whether the weight is stored as `weight_packed`, with `weight_shape` beside it."""
        return self.kind == "int8" and not self.plain

    @property
    def described(self) -> str:
        """For a person."""
        scales = "one scale" if self.tensor else "a scale per channel"
        return f"{self.kind} weights with {scales}, " + (
            f"activations rounded to {self.kind} per token" if self.dynamic else "activations as they are"
        )
