"""An environment that has what the runtime and the server depend on, and no more, serves an artifact of backend native.

It is made of the distributions that are installed here, as pip would choose them: no index is asked.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, distribution
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from packaging.requirements import Requirement

from furiosa_build.runtime import LLM, SamplingParams

ROOT = Path(__file__).parents[3]
PROMPT = "It was a"
MOST_BYTES = 150_000_000


def distributions(requirements: Iterable[str], extra: str = "") -> dict[str, Distribution]:
    """What requirements install, and what that requires."""
    found: dict[str, Distribution] = {}
    waiting = [(Requirement(text), extra) for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        installed = distribution(requirement.name)
        is_new = found.setdefault(installed.name, installed) is installed
        for each in sorted(requirement.extras) + ([""] if is_new else []):
            waiting += [(Requirement(text), each) for text in installed.requires or ()]
    return found


def make_environment(directory: Path, *extras: str) -> tuple[Path, int]:
    """The Python of a new environment with furiosa-build and these extras, and how many bytes that has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    [packages] = directory.glob("lib/python*/site-packages")
    total = 0
    for each in distributions(wanted).values():
        files = [file for file in each.files or () if ".." not in file.parts and "__pycache__" not in file.parts]
        for file in files:
            total += Path(str(file.locate())).stat().st_size
        for top in {file.parts[0] for file in files}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(each.locate_file(top))))
    for package in ("furiosa_build", "recipes", "conf"):
        (packages / package).symlink_to(ROOT / package)
    return directory / "bin" / "python", total


@contextmanager
def served(python: Path, artifact: Path) -> Iterator[str]:
    """The address of a server, in that environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from furiosa_build.cli.main import main; main()"
    process = subprocess.Popen(
        [python, "-I", "-c", code, "serve", artifact, "--port", str(port)], stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(600):
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=60).close()
                break
            except URLError:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.grid
def test_an_environment_of_the_runtime_alone_serves_an_artifact(
    build_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    artifact = build_artifact(ROOT / "examples" / "quickstart" / "model", backend="native")
    [expected] = LLM(artifact).generate(PROMPT, SamplingParams(temperature=0, max_tokens=24))
    python, size = make_environment(tmp_path / "environment", "serve")
    assert size < MOST_BYTES, f"{size} bytes"
    for name in ("torch", "transformers", "hydra", "doit"):
        tried = subprocess.run([python, "-I", "-c", f"import {name}"], capture_output=True, text=True, check=False)
        assert f"No module named '{name}'" in tried.stderr
    body = {"model": str(artifact), "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    with served(python, artifact) as url:
        listed = json.load(urlopen(f"{url}/v1/models", timeout=60))
        body["model"] = listed["data"][0]["id"]
        asked = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        answer = json.load(urlopen(asked, timeout=60))
    assert answer["choices"][0]["text"] == expected.outputs[0].text
    refused = subprocess.run(
        [python, "-I", "-c", "from furiosa_build.cli.main import main; main()", "build", "quickstart"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "the command needs the extra `build`" in refused.stderr
    assert "pip install 'furiosa-build[build]'" in refused.stderr
