"""What a build begins with: the model's files, on this machine or on the hub, and weights from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from furiosa_build.core.errors import UserError
from furiosa_build.core.file_digests import HashMemory
from furiosa_build.core.progress import expect
from furiosa_build.ir.outline import ParameterOutline
from furiosa_build.quant.compressed_tensors import QuantizedCheckpoint
from furiosa_build.recipe.schema import BuildSpec
from furiosa_build.weights.describe import describe
from furiosa_build.weights.hf_layout import INDEX_FILE, MODEL_FILES, check_weight_file, list_files, source_files
from furiosa_build.weights.hub import resolve_commit
from furiosa_build.weights.listing import PARAM_FILE, ModelFiles, Source, SourceFile
from furiosa_build.weights.locate import checkpoint_directory, local_directory, locate, param_file, read_config
from furiosa_build.weights.quantized import read_checkpoint


class Sources:
    """The sources of one model.

    Args:
        spec: What is built.
        roots: Where relative paths are looked up, in order.
        hashes: Digests of files.

    Attributes:
        quantized: The directory of the quantized checkpoint that is taken; None if none is.
        config: The fields of the model's config.json, or of the recipe's architecture.
    """

    def __init__(self, spec: BuildSpec, roots: Sequence[Path], hashes: HashMemory) -> None:
        self._model, self._roots, self._hashes = spec.model, roots, hashes
        self.quantized = checkpoint_directory(spec.quantization, roots)
        self.config: dict[str, Any] = read_config(spec.model, roots, weights=self.quantized is None)

    @property
    def directory(self) -> Path | None:
        """The model's directory; None for a model that is not on this machine, or has none."""
        return local_directory(self._model, self._roots)

    @property
    def param_file(self) -> Path | None:
        """The one file that has all weights, if there is one. Raises UserError where it is not there."""
        return param_file(self._model, self._roots)

    @property
    def has_weights(self) -> bool:
        """Whether the weights are those in the model's directory or on the hub."""
        return self._model.seed_for_random_weight is None and self._model.param_file_path is None and not self.quantized

    def read_checkpoint(self) -> QuantizedCheckpoint | None:
        """The quantized checkpoint that is taken, if there is one."""
        if self.quantized is None:
            return None
        checkpoint = read_checkpoint(self.quantized, self.config, self._model.num_hidden_layers)
        source_files(self.quantized)  # a weight file that is missing is said now
        return checkpoint

    def identity(self) -> dict[str, str | None]:
        """sha256 of the model's files, or the commit on the hub; None where it takes reading or downloading to know."""
        known = {name: self._hashes.recall(file) for name, file in self._files().items()}
        is_remote = self.directory is None and self._model.seed_for_random_weight is None
        return known | ({"commit": resolve_commit(self._model)} if is_remote else {})

    def unread_bytes(self) -> int:
        """Of the files whose digest is not known."""
        return sum(file.stat().st_size for file in self._unread())

    def read(self) -> None:
        """Downloads what is on the hub, and reads what `identity` does not know."""
        if self._model.seed_for_random_weight is None:
            self._locate(None)  # the hub's commit is known then
        unread = self._unread()
        expect(sum(file.stat().st_size for file in unread))
        for file in unread:
            if file.name not in (*MODEL_FILES, INDEX_FILE):
                check_weight_file(file)  # Before its terabytes are read, if that is what it says.
            self._hashes.hash(file)

    def describe(self, parameters: Mapping[str, ParameterOutline]) -> tuple[Source, ModelFiles]:
        """The files, read and listed by digest; `parameters` are those that are drawn where weights are random."""
        return describe(self._model, self._roots, parameters, self._hashes.hash, self.quantized)

    def unchanged_directory(self, files: Mapping[str, SourceFile], revision: str | None) -> Path:
        """Where the model's files are. Raises UserError when `files` are not as they were fetched."""
        directory = self._locate(revision)
        self.check_unchanged(directory, files)
        return directory

    def unchanged_weights(self, files: Mapping[str, SourceFile], revision: str | None) -> Path:
        """The directory that they are in, or the one file. Raises UserError when they are not as they were fetched."""
        file = self.param_file
        if file is None:
            return self.unchanged_directory(files, revision)
        if self._hashes.hash(file) != files[PARAM_FILE].sha256:
            raise UserError(f"{file.name} has changed since it was fetched", where=str(file), hint="build again")
        return file

    def check_unchanged(self, directory: Path, files: Mapping[str, SourceFile]) -> None:
        """Raises UserError when `files` in a directory are not as they were fetched."""
        for name, file in files.items():
            if self._hashes.hash(directory / name) != file.sha256:
                raise UserError(f"{name} has changed since it was fetched", where=str(directory), hint="build again")

    def _files(self) -> dict[str, Path]:
        """Those on this machine, but for the hub's cache."""
        directory, weights = self.directory, self.param_file
        files = {} if directory is None else {file.name: file for file in list_files(directory)}
        if not self.has_weights:
            files = {name: file for name, file in files.items() if name in MODEL_FILES}
        if weights is not None:
            files[PARAM_FILE] = weights
        if self.quantized is not None:
            files |= {f"quantized/{name}": self.quantized / name for name in source_files(self.quantized)}
        return files

    def _unread(self) -> list[Path]:
        return [file for file in self._files().values() if self._hashes.recall(file) is None]

    def _locate(self, revision: str | None) -> Path:
        """Where the model's files are; the weights among them only if they are taken."""
        return locate(self._model, self._roots, revision, weights=self.has_weights)
