"""Downloads files of a model on the hub: a process of its own, which can be ended at any moment.

    python -m furiosa_build.weights.download REQUEST

REQUEST is JSON: `repository`, `revision`, `patterns`, and `meter`, where bytes are counted, or null. It prints JSON:
the directory that the files are in, as `directory`; or `error`. What has been downloaded in part is kept by the hub's
library, and the next download goes on from there.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.core.progress import current, metered

if TYPE_CHECKING:
    from tqdm.auto import tqdm


def main(request: dict[str, Any]) -> None:
    """Does what the request says. Ends before that when the process that asked for it does: its pipe is closed then."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    meter = request.pop("meter")
    with metered(None if meter is None else Path(meter)):
        print(json.dumps(fetch(**request)))


def fetch(repository: str, revision: str, patterns: list[str]) -> dict[str, str]:
    """Takes what is in the hub's cache, and fetches what is not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = snapshot_download(
            repository, revision=revision, allow_patterns=patterns, tqdm_class=download_meter()
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {first_line}"}
    return {"directory": str(directory)}


def download_meter() -> type[tqdm[Any]]:
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


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
