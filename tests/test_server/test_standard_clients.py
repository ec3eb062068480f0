"""The standard clients of the field, as they are installed, against a server: the scripts of the directory clients.

They live in an environment of their own, which `make clients` makes; FURIOSA_TEST_CLIENTS names another.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from .conftest import MODEL, TEMPLATE
from .process import Server, server

pytestmark = pytest.mark.grid

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "clients"
ENVIRONMENT = Path(os.environ.get("FURIOSA_TEST_CLIENTS", ROOT / ".venv-clients"))
PATIENCE_S = 600


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart model in float32, so that its log probabilities can be compared closely, with a chat template."""
    directory = tmp_path_factory.mktemp("clients") / "model"
    shutil.copytree(MODEL, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float32", "torch_dtype": "float32"}))
    weights = directory / "model.safetensors"
    tensors = {name: tensor.float() for name, tensor in safetensors.torch.load_file(weights).items()}
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def served(build_artifact: Callable[..., Path], model: Path) -> Iterator[Server]:
    artifact = build_artifact(
        model, prefill_buckets=[[1, 512]], decode_buckets=[[4, 256], [4, 1024]], max_seq_len_to_capture=1024
    )
    with server(artifact) as started:
        started.wait_for("ready")
        yield started


def run(started: Server, tmp_path: Path, *command: str) -> str:
    """What a program of the clients' environment prints. No request of it may have been refused."""
    assert (ENVIRONMENT / "bin" / "python").is_file(), "make clients"
    home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "unused"}
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    before = refused(started)
    ran = subprocess.run(
        [str(ENVIRONMENT / "bin" / command[0]), *command[1:]],
        env=quiet | home,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
    assert refused(started) == before
    return ran.stdout


def refused(started: Server) -> list[str]:
    """The requests so far that were answered with 4xx or 5xx."""
    with started.http as http:
        lines = http.get("/metrics").text.splitlines()
    return [
        line for line in lines if line.startswith("furiosa_http_requests_total") and ('="4' in line or '="5' in line)
    ]


@pytest.mark.parametrize("script", ["openai_loops", "litellm_calls", "langchain_calls"])
def test_libraries(served: Server, tmp_path: Path, script: str) -> None:
    assert run(served, tmp_path, "python", str(SCRIPTS / f"{script}.py"), served.url)


@pytest.mark.parametrize("profile", ["concurrent,streams=2", "throughput,max_concurrency=4"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_guidellm(served: Server, model: Path, tmp_path: Path, profile: str, path: str) -> None:
    run(
        served,
        tmp_path,
        "guidellm",
        "run",
        *("--backend", f"kind=openai_http,target={served.url},request_format={path}"),
        *("--profile", f"kind={profile}"),
        *("--constraint", "kind=max_requests,count=4"),
        *("--tokenizer", f"kind=huggingface_auto,model={model}"),
        *("--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=8"),
        *("--output", "kind=json,path=report.json"),
        "--disable-console",
    )
    report = json.loads((tmp_path / "report.json").read_text())
    totals = report["benchmarks"][0]["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (4, 0)


def test_lm_eval_scores_as_its_own_model_does(served: Server, model: Path, tmp_path: Path) -> None:
    lines = run(served, tmp_path, "python", str(SCRIPTS / "lm_eval_scores.py"), served.url, str(model)).splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    theirs = found.pop("own")
    for ours in found.values():
        compare(ours, theirs)


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Log probabilities, greedy or not, and the scores made of them."""
    assert ours["samples"]["choices"]
    for of_us, of_them in zip(ours["samples"]["choices"], theirs["samples"]["choices"], strict=True):
        for (value, greedy), (expected, greedy_too) in zip(of_us, of_them, strict=True):
            assert value == pytest.approx(expected, abs=1e-3)
            assert greedy == greedy_too
    assert ours["samples"]["texts"]
    for [value], [expected] in zip(ours["samples"]["texts"], theirs["samples"]["texts"], strict=True):
        assert value == pytest.approx(expected, abs=1e-2)
    for task, metric in (("choices", "acc"), ("choices", "acc_norm"), ("texts", "byte_perplexity")):
        assert ours["results"][task][f"{metric},none"] == pytest.approx(
            theirs["results"][task][f"{metric},none"], rel=1e-4
        )
