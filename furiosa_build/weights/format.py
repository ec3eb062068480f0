"""What a format of weight files is: how to tell it, check a file of it, and read its tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from furiosa_build.ir.tensors import Layout

if TYPE_CHECKING:
    from furiosa_build.weights.source import TensorSource


class WeightFormat(ABC):
    """A format of weight files. Instances hold no state; nothing here imports torch before tensors are read.

    Attributes:
        name: What it is called in messages; also how the names of its files end where they are listed.
    """

    name: ClassVar[str]

    @abstractmethod
    def recognizes(self, file: Path) -> bool:
        """Whether a file is of this format, by its content: files in the store have no telling names."""

    @abstractmethod
    def check(self, file: Path) -> None:
        """Raises ValueError unless the file is sound as far as can be seen without reading its tensors."""

    @abstractmethod
    def open(self, files: Sequence[Path]) -> TensorSource:
        """The tensors of all these files. Raises UserError for a file that is not sound."""

    def layouts(self, file: Path) -> dict[str, Layout]:
        """dtype and shape of the tensors, by name. Raises ValueError as `check` does."""
        self.check(file)
        source = self.open([file])
        return {name: source.layout(name) for name in source.names()}

    def config(self, file: Path) -> dict[str, Any] | None:
        """The fields of a config.json that the file has of its model; None: it has tensors only."""
        del file
        return None
