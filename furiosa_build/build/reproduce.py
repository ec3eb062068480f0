"""Is the artifact a function of its inputs? It is built again in another place without the store, and compared."""

from __future__ import annotations

import filecmp
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from furiosa_build.artifact.schema import SIGNATURE_FILE, TIMESTAMP_FILE
from furiosa_build.build.build import Build
from furiosa_build.core.errors import VerificationError
from furiosa_build.ui.console import event_line

_MAY_DIFFER = {TIMESTAMP_FILE, SIGNATURE_FILE}


def check_reproducible(build: Build, run: Callable[[Build, str, bool], int], as_json: bool = False) -> None:
    """Builds a finished build's artifact again, with an empty store in a temporary directory.

    Args:
        build: `package` is done.
        run: Runs a task of a build, as text or JSON; exits or returns a status other than 0 when a step fails.
        as_json: Print an event a line in place of text.

    Raises VerificationError that names every file that differs.
    """
    text = "building again, without the store"
    print(event_line("message", text=text) if as_json else text, flush=True)
    with tempfile.TemporaryDirectory(prefix="furiosa-build-check-") as place:
        elsewhere = {"cache_dir": f"{place}/store", "save_dir": f"{place}/artifacts"}
        options = build.options.model_copy(update=elsewhere)
        again = Build(build.recipe.model_copy(update={"options": options}), build.cwd)
        try:
            if status := run(again, "package", as_json):
                sys.exit(status)
            differing = differing_files(build.version_directory, again.version_directory)
        finally:
            again.close()
    if as_json:
        status = VerificationError.exit_status if differing else 0
        print(event_line("check-ended", status=status, differing=differing), flush=True)
    if differing:
        listed = "".join(f"\n  {line}" for line in differing)
        raise VerificationError(f"built again, {build.version_directory} is not the same:{listed}")
    if not as_json:
        print("the same bytes in every file")


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
