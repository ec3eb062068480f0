"""How long commands take that find nothing to do: `python benchmarks/noop.py [RUNS]`.

Builds recipe `quickstart` with backend eager in a temporary directory, then runs each command in a fresh process.
The least and the median of the wall times, in seconds, from the start of Python to its end.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
OVERRIDES = ("backend=eager",)
COMMANDS = {
    "doit build recipe=quickstart": ("doit", "build", "recipe=quickstart", *OVERRIDES),
    "furiosa-build build quickstart": ("furiosa-build", "build", "quickstart", *OVERRIDES),
    "furiosa-build plan quickstart": ("furiosa-build", "plan", "quickstart", *OVERRIDES),
    "furiosa-build explain quickstart": ("furiosa-build", "explain", "quickstart", *OVERRIDES),
    "python -c pass": ("python", "-c", "pass"),
}


def main(runs: int) -> None:
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for name in ("recipes", "conf", "examples"):
            shutil.copytree(REPOSITORY / name, root / name)
        settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["doit"]
        dodo = (REPOSITORY / settings["dodoFile"]).as_posix()
        (root / "pyproject.toml").write_text(f'[tool.doit]\ndodoFile = "{dodo}"\ncwdPath = "."\n')
        environment = {**os.environ, "FURIOSA_BUILD_CACHE": str(root / "store")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # which users have not: modules would be compiled each time

        def run(command: tuple[str, ...]) -> str:
            program, *arguments = command
            ran = subprocess.run(
                [BIN / program, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=True
            )
            return ran.stdout

        run(COMMANDS["furiosa-build build quickstart"])
        for name, command in COMMANDS.items():
            seconds = []
            for _ in range(runs):
                begin = time.perf_counter()
                output = run(command)
                seconds.append(time.perf_counter() - begin)
            assert "build" not in command or "ran 0 of" in output, output
            print(f"{name:36} least {min(seconds):5.2f}  median {statistics.median(seconds):5.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
