"""Quantization schemes: how a weight is stored, and what its linear layer computes.

A scheme is a subclass of `QuantScheme` in a file of its own. Recipes, plans, keys and requests hold it as text, such as
`fp8` or `int8-plain-tensor-dynamic`; `scheme(text)` gives the object. Importing this module does not import torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from furiosa_build.core.errors import UserError, nearest
from furiosa_build.ir.dtypes import FLOATS
from furiosa_build.ir.sharding import Share
from furiosa_build.ir.tensors import Layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from furiosa_build.quant.config_group import ConfigGroup

_OWN = {
    "none": "furiosa_build.quant.none:Unquantized",
    "fp8": "furiosa_build.quant.fp8:Fp8",
    "int4": "furiosa_build.quant.int4:Int4",
    "int8": "furiosa_build.quant.int8:Int8",
}
_GROUP = "furiosa_build.quant_schemes"
"""Entry points of this group are schemes of other packages."""


class Mismatch(NamedTuple):
    """What is wrong with a stored tensor, and what would be right."""

    what: str
    valid: str


class QuantScheme(ABC):
    """How a weight [out, in] is stored, and what its linear layer computes. Equal schemes have equal text.

    A weight is stored as parts: tensors named relative to the layer's module, in checkpoints and in artifacts alike.

    Attributes:
        family: The name in the registry, and in recipes.
        words: What may follow the family's name in the text: each a boolean field of the class, unless `of_words` says
            otherwise.
        formats: Formats of compressed-tensors whose config groups `read` takes.
        scales: Parts that a checkpoint may store in any floating dtype, and any shape with as many numbers.
    """

    family: ClassVar[str]
    words: ClassVar[tuple[str, ...]] = ()
    formats: ClassVar[tuple[str, ...]] = ()
    scales: ClassVar[tuple[str, ...]] = ()

    @property
    def text(self) -> str:
        """The scheme as recipes, plans, keys and requests have it."""
        return "-".join([self.family, *(word for word in self.words if getattr(self, word))])

    @classmethod
    def of_words(cls, words: Sequence[str]) -> Self:
        """The scheme whose text has these words, of `cls.words`, behind the family's name."""
        return cls(**dict.fromkeys(words, True))

    @property
    @abstractmethod
    def described(self) -> str:
        """One phrase for a person."""

    @property
    def rounds_activations(self) -> bool:
        """Whether the layer rounds its input, with a scale for each token, found as it runs."""
        return False

    # Stored tensors

    @abstractmethod
    def parts(self, weight: Layout) -> dict[str, Layout]:
        """The tensors that a weight of this layout is stored as."""

    def stored_name(self, parameter: str, part: str) -> str:
        """The full name of a part of the weight whose full name is `parameter`."""
        return parameter.removesuffix("weight") + part

    def layouts(self, parameter: str, weight: Layout) -> dict[str, Layout]:
        """The parts by their full names."""
        return {self.stored_name(parameter, part): layout for part, layout in self.parts(weight).items()}

    def nbytes(self, weight: Layout) -> int:
        """Bytes of all parts of a weight."""
        return sum(layout.nbytes for layout in self.parts(weight).values())

    def derived(self, part: str, weight: Layout) -> Tensor | None:
        """A part that follows from the weight's shape alone; None for one that holds numbers of the weight."""
        del part, weight
        return None

    def refusal(self, weight: Layout) -> str:
        """Why a weight of this layout, which may be a rank's share, cannot be stored so; empty if it can."""
        del weight
        return ""

    def mismatch(self, part: str, weight: Layout, found: Layout, read: Callable[[], Tensor]) -> Mismatch | None:
        """How the part that a checkpoint has, of layout `found`, differs from what a weight of this layout has."""
        expected, is_scale = self.parts(weight)[part], part in self.scales
        dtypes = FLOATS if is_scale else (expected.dtype,)
        if found.dtype not in dtypes:
            return Mismatch(f"has dtype {found.dtype}", " or ".join(dtypes))
        fits = math.prod(found.shape) == math.prod(expected.shape) if is_scale else found.shape == expected.shape
        if not fits:
            return Mismatch(f"has shape {list(found.shape)}", str(list(expected.shape)))
        if (derived := self.derived(part, weight)) is not None and not (stored := read()).equal(derived):
            return Mismatch(f"says {stored.tolist()}", str(derived.tolist()))
        return None

    # Numbers

    @abstractmethod
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts of a weight [out, in]. Raises ValueError where weights are only taken from checkpoints."""

    @abstractmethod
    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that parts stand for, in the dtype of the model."""

    def shard(self, part: str, stored: Tensor, share: Share) -> Tensor:
        """A rank's share of a stored part, in the shape that `parts` says for a weight of the share's layout.

        A dimension that is cut is sliced in proportion; parts without it, such as one scale for all, stay whole.
        """
        whole, own = self.parts(share.whole)[part], self.parts(share.local)[part]
        stored = stored.reshape(whole.shape)
        if share.is_zero:
            return stored.new_zeros(own.shape)
        if share.dim is not None and whole.shape != own.shape:
            begin = share.begin * whole.shape[share.dim] // share.whole.shape[share.dim]
            return stored.narrow(share.dim, begin, own.shape[share.dim])
        return stored

    # The layer

    def operands(self, weight: Layout) -> dict[str, Layout]:
        """The parts that the layer computes with, as its program sees their bytes. The first has a row per output."""
        return self.parts(weight)

    @abstractmethod
    def product(self, x: Tensor, operands: Sequence[Tensor]) -> Tensor:
        """x [..., in] times the transposed weight -> [..., out] in the dtype of x. The reference for backends."""

    def rows(self, ids: Tensor, operands: Sequence[Tensor], columns: int) -> Tensor:
        """Rows `ids` [...] of the weight, which has so many columns: [..., columns], as `dequantize` has them.

        Only of schemes that an embedding may have.
        """
        raise NotImplementedError(f"{self.family}: an embedding cannot have it")

    def round(self, x: Tensor, largest: Tensor) -> Tensor:
        """x [..., in] as the layer sees it, of the same dtype. `largest` [..., 1] is each token's largest magnitude."""
        del largest
        return x

    # The checkpoint's configuration

    @classmethod
    def claims(cls, group: ConfigGroup) -> bool:
        """Whether a config group that has one of `formats` is for this family to read, or to refuse."""
        del group
        return True

    @classmethod
    def read(cls, group: ConfigGroup) -> Self:
        """The scheme of a config group that has one of `formats`. Raises UserError for what is not supported."""
        raise NotImplementedError(f"{cls.family} has no formats")

    @abstractmethod
    def config_group(self) -> dict[str, Any]:
        """`weights`, `input_activations`, `output_activations` and `format` of a config group of compressed-tensors."""


@cache
def scheme(text: str) -> QuantScheme:
    """The scheme that a text names. Raises UserError, with the names there are, for an unknown one."""
    name, *words = text.split("-")
    family = _family(name)
    if unknown := set(words) - set(family.words):
        raise UserError(f"{text!r} is not a form of {name}: it has no {sorted(unknown)}", where="quantization")
    return family.of_words(words)


def has_word(name: str, word: str) -> bool:
    """Whether a word may follow the family's name in the text of a scheme."""
    return word in _family(name).words


def with_words(name: str, words: Iterable[str]) -> str:
    """The text of a family's scheme, with those of the words that the family has."""
    if own := [word for word in words if has_word(name, word)]:
        return _family(name).of_words(own).text
    return name


def exists(name: str) -> bool:
    """Whether recipes may name this scheme."""
    return name in _OWN or name in _others()


def names() -> list[str]:
    """The families: what recipes may name."""
    return [*_OWN, *sorted(_others())]


def families() -> list[type[QuantScheme]]:
    """All scheme classes."""
    return [_family(name) for name in names()]


def summary(schemes: Iterable[str]) -> str:
    """One text for the schemes of a model's quantized weights, such as `fp8+int8`; `none` without any."""
    return "+".join(sorted(set(schemes))) or "none"


def modules(schemes: Iterable[str]) -> list[str]:
    """The modules of this project that define these schemes: what a step that uses them runs."""
    found = {type(scheme(text)).__module__ for text in ("none", *schemes)}
    return sorted(name for name in found if name.startswith("furiosa_build."))


def versions(schemes: Iterable[str]) -> dict[str, str]:
    """Versions of the other packages that define some of these schemes, by the package's name."""
    wanted = {text.partition("-")[0] for text in schemes} - _OWN.keys()
    if not wanted:
        return {}
    packages = (entry.dist for entry in entry_points(group=_GROUP) if entry.name in wanted)
    return {package.name: package.version for package in packages if package is not None}


def _family(name: str) -> type[QuantScheme]:
    if name in _OWN:
        module, _, attribute = _OWN[name].partition(":")
        return getattr(import_module(module), attribute)  # type: ignore[no-any-return]
    others = _others()
    if name in others:
        return others[name]()
    valid = names()
    raise UserError(
        f"unknown quantization scheme {name!r}",
        where="quantization",
        valid=", ".join(valid),
        hint=nearest(name, valid),
    )


def _others() -> dict[str, Callable[[], type[QuantScheme]]]:
    return {entry.name: entry.load for entry in entry_points(group=_GROUP)}
