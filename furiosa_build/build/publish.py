"""What a build has in the output directory: the published artifact, how it qualified, and `latest`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from furiosa_build.artifact import writer
from furiosa_build.artifact.schema import MANIFEST_FILE, Manifest
from furiosa_build.steps import qualify
from furiosa_build.store import ActionRecord, Store

PUBLISHED = ("package", "qualify")
"""The steps whose outputs are put into the output directory."""


class Publication:
    """An artifact in its output directory.

    Args:
        directory: SAVE_DIR/NAME, where the artifact's versions are.
        store: Where the files of the artifact are.
        package: What the step `package` has made.
    """

    def __init__(self, directory: Path, store: Store, package: ActionRecord) -> None:
        self._store = store
        self._manifest = Manifest.model_validate(store.read_json(package, MANIFEST_FILE))
        self.directory = directory / writer.version_of(self._manifest.artifact_id)

    def has(self, step: str, is_latest: bool = True) -> bool:
        """Whether what follows from a step is there and whole; `is_latest`: and `latest` points to the artifact."""
        if step == "package":
            return writer.is_published(self.directory, self._manifest, self._store.link_hashes.hash)
        has_figures = writer.qualification_file(self.directory).is_file()
        return has_figures and (not is_latest or writer.latest_is(self.directory))

    def why_not(self, step: str) -> str:
        """What is missing or damaged of that."""
        if step == "qualify":
            has_figures = writer.qualification_file(self.directory).is_file()
            missing = "latest does not point to it" if has_figures else "the figures are gone"
            return f"{self.directory.name} qualified before; {missing}"
        if not self.directory.exists():
            return f"the artifact is in the store, and not in {self.directory}"
        damaged = list(writer.damaged_files(self.directory, self._manifest, self._store.link_hashes.hash))
        return f"damaged in {self.directory}: {', '.join(damaged[:3])}{', ...' if damaged[3:] else ''}"

    def publish(self, records: Iterable[ActionRecord]) -> None:
        """Puts the artifact in place, of the outputs of these actions, unless it is there."""
        if self.has("package"):
            return
        by_digest = {o.sha256: self._store.path(o) for record in records for o in record.outputs.values()}
        files = {path: by_digest[file.sha256] for path, file in self._manifest.files.items()}
        hashes = self._store.link_hashes
        if writer.publish(self.directory, self._manifest, files, hashes.hash, hashes.remember):
            text = f"the signature of {self.directory} is removed: it is not of these files; sign it again"
            self._store.notify(text)

    def accept(self, qualified: ActionRecord, is_latest: bool = True) -> None:
        """Writes down how the artifact qualified; `is_latest`: and makes `latest` point to it."""
        figures = self._store.path(qualified.outputs[qualify.OUTPUT])
        writer.write_qualification(self.directory, figures.read_bytes())
        if is_latest:
            writer.point_latest_to(self.directory)
