"""Downloads files of a model on the hub: a process of its own, which can be ended at any moment.

    python -m furiosa_build.weights.download REQUEST

REQUEST is JSON: `repository`, `revision`, `patterns`, and `meter`, where bytes are counted, or null. It prints JSON:
the directory that the files are in, as `directory`; or `error` with a `hint`. What has been downloaded in part is kept
by the hub's library, and the next download goes on from there. Without `patterns` it reads the headers of the
safetensors files alone: it prints `files`, each with the dtype and shape of its tensors, and what their index says, as
`metadata`; or, where there are no such files, `others`: what there is.
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
        print(json.dumps(answer(request)))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What is fetched, or why it cannot be."""
    try:
        return fetch(**request) if request["patterns"] else read_headers(request["repository"], request["revision"])
    except Exception as error:  # also those of the libraries that it uses
        what, hint = reason(error, request["repository"], request["revision"])
        return {"error": what, "hint": hint}


def reason(error: BaseException, repository: str, revision: str) -> tuple[str, str]:
    """Why the hub gives nothing, and what helps: what its library raises, in words."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause = error.__cause__ or error
    token = "set" if os.environ.get("HF_TOKEN") else "not set"
    if constants.is_offline_mode():
        return "its files are not all in the hub's cache, and HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{repository}"
        return "access to it is restricted", f"ask for it at {page}, and set HF_TOKEN ({token}) to a token that has it"
    if isinstance(error, RepositoryNotFoundError):
        hint = f"if it is private, set HF_TOKEN ({token}) to a token that may read it"
        return "the hub has no model of this name, or it is private", hint
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}", "name a branch, a tag or a commit of it by model.revision"
    if isinstance(cause, HfHubHTTPError) and cause.response is not None:
        status = f"{cause.response.status_code} {cause.response.reason_phrase}"
        return f"the hub, {constants.ENDPOINT}, answers {status}", f"HF_TOKEN is {token}; else try again later"
    first_line = (str(cause).splitlines() or [""])[0]
    what = f"{type(cause).__name__}: {first_line}"
    if isinstance(error, LocalEntryNotFoundError):
        return f"the hub, {constants.ENDPOINT}, cannot be reached ({what})", "is the network there?"
    return what, f"is the network there, and does HF_TOKEN ({token}) give access?"


def fetch(repository: str, revision: str, patterns: list[str]) -> dict[str, Any]:
    """Takes what is in the hub's cache, and fetches what is not."""
    from huggingface_hub import snapshot_download

    directory = snapshot_download(repository, revision=revision, allow_patterns=patterns, tqdm_class=download_meter())
    return {"directory": str(directory)}


def read_headers(repository: str, revision: str) -> dict[str, Any]:
    """Reads some kilobytes of each file. As for loading, a whole file goes before shards."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        found = HfApi().get_safetensors_metadata(repository, revision=revision)
    except NotASafetensorsRepoError:
        return {"others": HfApi().list_repo_files(repository, revision=revision)}
    files = {
        name: {tensor: [entry.dtype, entry.shape] for tensor, entry in file.tensors.items()}
        for name, file in found.files_metadata.items()
    }
    return {"files": files, "metadata": found.metadata}


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
