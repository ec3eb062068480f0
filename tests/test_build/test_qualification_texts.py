"""`qualify.texts`: a file of the user's, of which the beginning is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from test_steps.test_qualification.test_texts import write
from user_directory import UserDirectory, steps_in_this_process

from furiosa_build.core.errors import UserError

INT8 = ("quantization=int8", "qualify.texts=mine.txt")


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


def figures(user: UserDirectory) -> dict[str, Any]:
    latest = user.artifacts / "latest"
    return dict(json.loads(latest.resolve().with_suffix(".qualify.json").read_text()))


def test_a_quantized_model_is_measured_on_it(user: UserDirectory) -> None:
    for file in write(user.root / "tokenizer").iterdir():
        file.rename(user.root / "tiny" / file.name)
    text = user.root / "mine.txt"
    text.write_text("!#$" * 20)  # tokens of a vocabulary of 64
    user.build(*INT8)
    first = figures(user)
    assert first["quantization_tokens"] == 60 - 1
    text.write_text("1234567890" * 3)
    before = user.latest()
    assert user.build(*INT8) == ["fetch", "package", "qualify"]
    assert user.latest() == before, "no byte of the artifact depends on it"
    second = figures(user)
    assert second["quantization_tokens"] == 30 - 1
    assert first["quantization_perplexity"] != second["quantization_perplexity"]
    assert user.build(*INT8) == []


def test_one_that_is_missing(user: UserDirectory) -> None:
    with pytest.raises(UserError, match=r"the texts 'mine.txt' do not exist, or are not a file"):
        user.build(*INT8)
