"""What a build begins with: where the model is described, and where its weights come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.core.errors import UserError
from furiosa_build.core.file_digests import HashMemory
from furiosa_build.core.progress import expect
from furiosa_build.ir.outline import ParameterOutline
from furiosa_build.recipe.schema import BuildSpec
from furiosa_build.weights.config import config_of
from furiosa_build.weights.describe import describe, listed
from furiosa_build.weights.directory import ModelDirectory
from furiosa_build.weights.formats import check_weight_file
from furiosa_build.weights.header import Header, same_bytes
from furiosa_build.weights.hf_layout import (
    INDEX_FILE,
    TOKENIZER_FILES,
    TOKENIZER_VOCABULARIES,
    WEIGHT_PATTERNS,
    matches,
)
from furiosa_build.weights.hub import HubModel
from furiosa_build.weights.kinds import find_source
from furiosa_build.weights.listing import ListedFile, ListedWeights, ModelFiles, Original
from furiosa_build.weights.model_source import ModelSource, Reference
from furiosa_build.weights.single_file import WeightFile

if TYPE_CHECKING:
    from furiosa_build.quant.compressed_tensors import QuantizedCheckpoint

TEXTS = "qualify.texts"
"""What the file of that key is called among the source's files."""


class Sources:
    """The sources of one model. Raises UserError for one that does not exist.

    Args:
        spec: What is built.
        roots: Where relative paths are looked up, in order.
        hashes: Digests of files.

    Attributes:
        quantized: The directory of the quantized checkpoint that is taken; None if none is.
        config: The fields of the model's config.json, or of the recipe's architecture.
        weights: Where the weights come from.
        downloads: The source that weights are downloaded from; None if they are on this machine or are drawn.
    """

    def __init__(self, spec: BuildSpec, roots: Sequence[Path], hashes: HashMemory) -> None:
        self._spec, self._roots, self._hashes, self._texts_name = spec.model, roots, hashes, spec.qualify.texts
        model = find_source(Reference(spec.model.model_id_or_path, roots, spec.model.revision))
        if model is None and (spec.model.architecture is None or spec.model.seed_for_random_weight is None):
            raise UserError(
                f"model directory {spec.model.model_id_or_path!r} does not exist",
                where="model.model_id_or_path",
                valid="a directory in Hugging Face layout (also relative to the recipe's root), or a hub id: org/name",
            )
        self.quantized = self._find_quantized(spec.quantization.quantize_artifact_path)
        weights = self._find_weights(model)
        assert weights is not None  # its model exists, or they are drawn
        self.weights = weights
        self.config: dict[str, Any] = config_of(spec.model, model, own_weights=self.quantized is None)
        # Of a model on the hub whose weights are drawn nothing is downloaded but the config.
        self._description = None if model is None or (model.is_remote and self.weights.seed is not None) else model
        self.downloads = self.weights if isinstance(self.weights, HubModel) else None

    def read_checkpoint(self) -> QuantizedCheckpoint | None:
        """The quantized checkpoint that is taken, if there is one."""
        if self.quantized is None:
            return None
        checkpoint = self.weights.quantization(self.config, self._spec.num_hidden_layers)
        self.weights.weight_files()  # raises for one that is missing
        return checkpoint

    def header(self) -> Header | None:
        """What the weights' files store, if they are on this machine."""
        return self.weights.header()

    def same_values(self, one: str, other: str) -> bool:
        """Whether two stored tensors are equal, byte by byte. They are read once, as files are."""
        files = list(self.weights.weight_files().values())
        return same_bytes(files, one, other, lambda path, extent: self._hashes.hash(path, extent=extent))

    @property
    def described(self) -> str:
        """Where the weights come from, for messages: their directory, or the one file that they are."""
        if self.weights.is_remote:
            return self._spec.model_id_or_path
        files = self.weights.weight_files().items()
        return next((str(path.parent if path.name == name else path) for name, path in files), "random weights")

    def identity(self) -> dict[str, str | None]:
        """sha256 of the model's files, or the commit on the hub; None where it takes reading or downloading to know."""
        known = {name: self._hashes.recall(file) for name, file in self._files_here().items()}
        if self._description is not None and self._description.is_remote:
            known["commit"] = self._description.commit()
        return known

    @property
    def is_on_hub(self) -> bool:
        """Whether the model's config and tokenizer are on the hub."""
        return self._description is not None and self._description.is_remote

    def tokenizer_identity(self) -> dict[str, str]:
        """What tells the tokenizer from others: sha256 of its files, or the commit on the hub; empty: there is none.

        Raises UserError where the commit is not known, and the hub cannot be asked.
        """
        if self._description is not None and self.is_on_hub:
            if self._description.commit() is None:
                self._description.model_files()  # then it is
            commit = self._description.commit()
            assert commit is not None
            return {"commit": commit}
        return {name: self._hashes.hash(file) for name, file in self.tokenizer_files().items()}

    def tokenizer_files(self) -> dict[str, Path]:
        """The tokenizer's files, by name; downloads what is on the hub. Empty where there is no vocabulary."""
        files = {} if self._description is None else self._description.model_files()
        if not any(matches(name, TOKENIZER_VOCABULARIES) for name in files):
            return {}
        return {name: file for name, file in files.items() if matches(name, TOKENIZER_FILES)}

    def unread_bytes(self) -> int:
        """Bytes of the files whose digest is not known."""
        return sum(file.stat().st_size for file in self._unread().values())

    def read(self) -> None:
        """Downloads what is on the hub, and reads what `identity` does not know."""
        self.weights.weight_files()
        if self._description is not None:
            self._description.model_files()  # the hub's commit is known then
        unread, weights = self._unread(), set(self.weights.weight_files().values())
        expect(sum(file.stat().st_size for file in unread.values()))
        for file in unread.values():
            if file in weights and file.name != INDEX_FILE:
                check_weight_file(file)  # before its terabytes are read, if that is what it says
            self._hashes.hash(file)

    def describe(self, parameters: Mapping[str, ParameterOutline]) -> tuple[ListedWeights, ModelFiles, Original]:
        """The files, read and listed by digest; `parameters` are those that are drawn where weights are random."""
        weights, others = describe(self._spec, self._description, self.weights, parameters, self._hashes.hash)
        original = listed(self._original_files(self._description, self.weights), self._hashes.hash)
        texts = listed(self._texts(), self._hashes.hash)
        return weights, others, Original(files=original, texts=texts.get(TEXTS))

    def unchanged_weights(self, listed: Mapping[str, ListedFile], revision: str | None) -> dict[str, Path]:
        """The files of weights, by name. Raises UserError when they are not as they were fetched."""
        return self._unchanged(self.weights.at(revision).weight_files(), listed)

    def unchanged_model_files(self, listed: Mapping[str, ListedFile], revision: str | None) -> dict[str, Path]:
        """The files beside them, by name. Raises UserError when they are not as they were fetched."""
        found = {} if self._description is None else self._description.at(revision).model_files()
        return self._unchanged(found, listed)

    def unchanged_original(self, listed: Mapping[str, ListedFile], revision: str | None) -> dict[str, Path]:
        """All files that transformers may open, by name. Raises UserError when they are not as they were fetched."""
        description = None if self._description is None else self._description.at(revision)
        return self._unchanged(self._original_files(description, self.weights.at(revision)), listed)

    def unchanged_texts(self, listed: ListedFile) -> Path:
        """The file of `qualify.texts`. Raises UserError when it is not as it was fetched."""
        return self._unchanged(self._texts(), {TEXTS: listed})[TEXTS]

    def _original_files(self, description: ModelSource | None, weights: ModelSource) -> dict[str, Path]:
        """What transformers may open: the model's files, and in place of its weights those that the recipe names."""
        found = self._described_files(description)
        # Those that are quantized already are no model for transformers alone.
        return found if self.quantized else found | weights.weight_files()

    def _described_files(self, description: ModelSource | None) -> dict[str, Path]:
        """The model's files, without weights that are not used."""
        found = {} if description is None else description.original_files()
        is_used = self.weights is self._description
        return {name: file for name, file in found.items() if is_used or not matches(name, WEIGHT_PATTERNS)}

    def _texts(self) -> dict[str, Path]:
        if self._texts_name is None:
            return {}
        found = next((path for path in Reference(self._texts_name, self._roots).paths() if path.is_file()), None)
        if found is None:
            raise UserError(
                f"the texts {self._texts_name!r} do not exist, or are not a file",
                where="qualify.texts",
                valid="a file of text in UTF-8 (also relative to the recipe's root), or null",
            )
        return {TEXTS: found}

    def _unchanged(self, found: Mapping[str, Path], listed: Mapping[str, ListedFile]) -> dict[str, Path]:
        for name, file in listed.items():
            if name not in found or self._hashes.hash(found[name]) != file.sha256:
                path = found.get(name)
                raise UserError(
                    f"{name if path is None else path.name} has changed since it was fetched",
                    where="" if path is None else str(path),
                    hint="build again",
                )
        return {name: found[name] for name in listed}

    def _files_here(self) -> dict[str, Path]:
        """The files on this machine, but for the hub's cache."""
        files: dict[str, Path] = {}
        if self._description is not None and not self._description.is_remote:
            files |= self._description.model_files() | self._described_files(self._description)
        if not self.weights.is_remote:
            inside = "quantized/" if self.quantized else ""
            with suppress(UserError):  # `read` raises it
                files |= {f"{inside}{name}": file for name, file in self.weights.weight_files().items()}
        return files | self._texts()

    def _unread(self) -> dict[str, Path]:
        return {name: file for name, file in self._files_here().items() if self._hashes.recall(file) is None}

    def _find_quantized(self, path: str | None) -> Path | None:
        if path is None:
            return None
        found = ModelDirectory.sniff(Reference(path, self._roots))
        if found is None:
            raise UserError(
                f"quantized checkpoint {path!r} does not exist",
                where="quantization.quantize_artifact_path",
                valid="a directory with a compressed-tensors checkpoint (also relative to the recipe's root)",
            )
        return found.path

    def _find_weights(self, model: ModelSource | None) -> ModelSource | None:
        """The weights are the model's own unless the recipe names others; None: there are none."""
        if self._spec.seed_for_random_weight is not None:
            return find_source(Reference(seed=self._spec.seed_for_random_weight))
        if self.quantized is not None:
            return ModelDirectory(self.quantized)
        if self._spec.param_file_path is None:
            return model
        found = WeightFile.sniff(Reference(self._spec.param_file_path, self._roots))
        if found is None:
            raise UserError(
                f"parameter file {self._spec.param_file_path!r} does not exist, or is not a file",
                where="model.param_file_path",
                valid="a file that holds all parameters of the model, by their names in its state dict",
            )
        return found
