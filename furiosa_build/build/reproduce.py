"""Is the artifact a function of its inputs? It is built again in another place without the store, and compared."""

from __future__ import annotations

import filecmp
import tempfile
from collections.abc import Sequence
from pathlib import Path

from furiosa_build.artifact.schema import SIGNATURE_FILE, TIMESTAMP_FILE
from furiosa_build.build import graph
from furiosa_build.build.build import Build
from furiosa_build.core.errors import VerificationError
from furiosa_build.core.events import CheckFinished, Emitter, Listener

_MAY_DIFFER = {TIMESTAMP_FILE, SIGNATURE_FILE}


def check_reproducible(build: Build, listeners: Sequence[Listener] = (), signals: Sequence[int] = ()) -> int:
    """Builds a finished build's artifact again, with an empty store in a temporary directory.

    Args:
        build: `package` is done.
        listeners: Called with the events of the second build, and in the end with the files that differ.
        signals: As of `graph.execute`.

    Returns the exit status: that of VerificationError if files differ, that of the error if the second build fails.
    """
    events = Emitter(listeners)
    events.note("building again, without the store")
    with tempfile.TemporaryDirectory(prefix="furiosa-build-check-") as temporary:
        elsewhere = {"cache_dir": f"{temporary}/store", "save_dir": f"{temporary}/artifacts"}
        options = build.options.model_copy(update=elsewhere)
        again = Build(build.recipe.model_copy(update={"options": options}), build.cwd, listeners=listeners)
        try:
            if status := graph.run(again, "package", signals=signals):
                return status
            differing = differing_files(build.version_directory, again.version_directory)
        finally:
            again.close()
    events.emit(CheckFinished(directory=build.version_directory, differing=tuple(differing)))
    return VerificationError.exit_status if differing else 0


def differing_files(first: Path, second: Path) -> list[str]:
    """A line for each file that is not the same in both artifacts, but for those that hold the time or a signature."""
    names = {
        path.relative_to(root).as_posix() for root in (first, second) for path in root.rglob("*") if path.is_file()
    }
    lines = []
    for name in sorted(names - _MAY_DIFFER):
        a, b = first / name, second / name
        if not (a.is_file() and b.is_file()):
            lines.append(f"{name} is only in the {'first' if a.is_file() else 'second'} build")
        elif not a.samefile(b) and not filecmp.cmp(a, b, shallow=False):
            lines.append(f"{name} differs")
    return lines
