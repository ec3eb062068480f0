"""An artifact that chats, and a server of it that the tests of this directory share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .process import Server, server

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"

TEMPLATE = (
    "{% if style %}({{ style }}){% endif %}"
    "{% for tool in tools or [] %}TOOL {{ tool.function.name }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def chat_artifact(build_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart model with a chat template. Its context is long, so that a text takes a while."""
    model = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(MODEL, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return build_artifact(
        model,
        prefill_buckets=[[1, 128]],
        decode_buckets=[[4, 128], [4, 1024]],
        max_seq_len_to_capture=1024,
        output_last_hidden_state=True,
    )


@pytest.fixture(scope="session")
def last_only(build_artifact: Callable[..., Path]) -> Iterator[Server]:
    """A server of an artifact that gives the logits of a prompt's last token, and nothing else."""
    artifact = build_artifact(
        MODEL,
        prefill_buckets=[[1, 128]],
        decode_buckets=[[4, 128]],
        max_seq_len_to_capture=128,
        calculate_logit_only_for_last_token=True,
    )
    with server(artifact) as started:
        started.wait_for("ready")
        yield started


@pytest.fixture(scope="session")
def running(chat_artifact: Path) -> Iterator[Server]:
    """A server that is ready. The second text of a request whose id is `broken` fails in its first step."""
    with server(chat_artifact, environment={"FURIOSA_BUILD_FAULT": "request:broken-1@step=errno:EIO"}) as started:
        started.wait_for("ready")
        yield started
