"""Where a model comes from: what a source of one is, whatever kind it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from furiosa_build.core.files import expand_user

if TYPE_CHECKING:
    from furiosa_build.quant.compressed_tensors import QuantizedCheckpoint
    from furiosa_build.weights.header import Header


@dataclass(frozen=True)
class Reference:
    """What a recipe says of where a model, or its weights, come from.

    Attributes:
        name: A path or a hub id, such as `model.model_id_or_path`.
        roots: Where a relative path is looked up, in order.
        revision: The revision of a model on the hub; None: `main`.
        seed: Draw the weights from this seed.
    """

    name: str = ""
    roots: Sequence[Path] = ()
    revision: str | None = None
    seed: int | None = None

    def paths(self) -> list[Path]:
        """The paths that the name may stand for, in the order in which they are looked up."""
        expanded = expand_user(self.name, "model.model_id_or_path")
        return [expanded] if expanded.is_absolute() else [root / expanded for root in self.roots]


class ModelSource(ABC):
    """A source of a model: its config, the files that travel beside its weights, and its weights; or some of these.

    Attributes:
        is_remote: Its files are not on this machine before they are asked for.
        seed: What its weights are drawn from; None: they are in files.
    """

    is_remote: ClassVar[bool] = False
    seed: int | None = None

    @classmethod
    @abstractmethod
    def sniff(cls, reference: Reference) -> ModelSource | None:
        """The source, if the reference names one of this kind."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The fields of the model's config.json. Raises UserError where there is none."""

    def commit(self) -> str | None:
        """The commit that its revision stands for; None while that is unknown, and where there are no commits."""
        return None

    def at(self, commit: str | None) -> ModelSource:
        """The source as it is at a commit, if it has commits."""
        del commit
        return self

    def quantization(self, model: Mapping[str, Any], layers: int | None) -> QuantizedCheckpoint | None:
        """The scheme of each weight, where the weights are quantized already; None: this kind of source has none such.

        Args:
            model: The fields of the config.json of the model that was quantized.
            layers: How many of its layers are taken; None: all.

        Raises:
            UserError: It is of another model, or quantized in a way that this version cannot compute.
        """
        del model, layers
        return None

    def model_files(self) -> dict[str, Path]:
        """config.json, the tokenizer's files and such, by name; a remote source fetches them.

        Raises UserError for one that must not be read.
        """
        return {}

    def original_files(self) -> dict[str, Path]:
        """Every file that transformers may open to load the model, by its name there: also those the build ignores."""
        return {}

    def header(self) -> Header | None:
        """What the weights' files store; None where that takes a download, and where there are no files.

        Raises UserError for files that are missing or not sound.
        """
        return None

    def weight_files(self) -> dict[str, Path]:
        """The files of weights, and their index, by the names that they are listed under; a remote source fetches them.

        Raises UserError when one is missing.
        """
        return {}
