"""Models on the Hugging Face hub, and its cache on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.core.errors import UserError
from furiosa_build.core.progress import current
from furiosa_build.recipe.schema import ModelSpec
from furiosa_build.weights.hf_layout import INDEX_FILE, MODEL_FILES, WEIGHT_PATTERNS

if TYPE_CHECKING:
    from tqdm.auto import tqdm


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


_COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_cache() -> Path:
    """The directory of the hub's cache on this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def resolve_commit(model: ModelSpec) -> str | None:
    """The commit that a hub model's revision stands for, if that is known without asking the hub."""
    revision = model.revision or "main"
    if _COMMIT.fullmatch(revision):
        return revision
    snapshot = cached_snapshot(model)
    return None if snapshot is None else snapshot.name


def cached_snapshot(model: ModelSpec) -> Path | None:
    """The directory in the hub's cache that has files of the model's revision, if there is one."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", INDEX_FILE, "model.safetensors"):
        file = try_to_load_from_cache(model.model_id_or_path, name, revision=model.revision, cache_dir=hub_cache())
        if isinstance(file, str):
            return Path(file).parent
    return None


def cached_bytes(model: ModelSpec) -> int:
    """Bytes of the model's files that need no download any more: of its revision, and of those that are wanted."""
    snapshot = cached_snapshot(model)
    if snapshot is None:
        return 0
    found = {path for pattern in (*WEIGHT_PATTERNS, *MODEL_FILES) for path in snapshot.glob(pattern)}
    return sum(path.stat().st_size for path in found if path.is_file())


def download(model: ModelSpec, revision: str | None, patterns: Sequence[str]) -> Path:
    """Takes what is in the hub's cache, and fetches what is not. The result's name is the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model.model_id_or_path,
                revision=revision or model.revision or "main",
                allow_patterns=list(patterns),
                tqdm_class=_download_meter(),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        token = "set" if os.environ.get("HF_TOKEN") else "not set"
        raise UserError(
            f"model {model.model_id_or_path!r} (revision {revision or model.revision or 'main'}) could not be fetched: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            where="model.model_id_or_path",
            hint=f"is the network there, and does HF_TOKEN ({token}) give access? A local copy works as well: "
            "model.model_id_or_path=DIRECTORY. For random weights: model.seed_for_random_weight=0",
        ) from error


def _download_meter() -> type[tqdm[Any]]:
    """What the hub's library tells of its progress, which it would draw itself, goes to this step's meter."""
    from tqdm.auto import tqdm

    meter = current()

    class DownloadMeter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts = kwargs.get("unit") == "B" and not kwargs.get("desc", "").startswith("Downloading")
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self.counts and meter is not None:
                self.n += int(n or 0)
                meter.note(int(self.n), int(self.total or 0))

    return DownloadMeter
