"""Held-out loss of the quickstart model, measured through the runtime: quantization must not cost quality."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from grid import grid
from tokenizers import Tokenizer

from furiosa_build.runtime import LLM, SamplingParams

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
END = 0
"""`<|endoftext|>`, which stands before, between and after chapters."""

WINDOW = 256
README_LOSS = 3.424
"""Nats a token in windows of 256, by examples/quickstart/README.md."""


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    """heldout.txt as train.py reads it: windows side by side, the first token of each the last of the one before."""
    tokenizer = Tokenizer.from_file(str(QUICKSTART / "model" / "tokenizer.json"))
    chapters = (QUICKSTART / "heldout.txt").read_text(encoding="utf-8").strip("\n").split("\n\n")
    ids = [END]
    for chapter in tokenizer.encode_batch(chapters):
        ids += [*chapter.ids, END]
    return [ids[start : start + WINDOW + 1] for start in range(0, len(ids) - 1, WINDOW)]


@pytest.fixture(scope="module")
def loss_of(build_artifact: Callable[..., Path], windows: list[list[int]]) -> Callable[[str], float]:
    """The loss of an artifact of a scheme: nats a token, every token but the first counted once."""
    measured: dict[str, float] = {}

    def measure(scheme: str) -> float:
        if scheme not in measured:
            artifact = build_artifact(
                QUICKSTART / "model",
                scheme=scheme,
                prefill_buckets=[[1, WINDOW + 1]],
                append_buckets=[],
                decode_buckets=[[1, WINDOW + 1]],
                max_seq_len_to_capture=WINDOW + 1,
            )
            params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
            total, count = 0.0, 0
            for window, output in zip(windows, LLM(artifact).generate(windows, params), strict=True):
                assert output.prompt_logprobs is not None
                for token, entry in zip(window[1:], output.prompt_logprobs[1:], strict=True):
                    assert entry is not None
                    total -= entry[token].logprob
                    count += 1
            measured[scheme] = total / count
        return measured[scheme]

    return measure


def test_bfloat16_loss_is_the_one_the_readme_states(loss_of: Callable[[str], float]) -> None:
    # The figure is rounded to 0.001; the rest is bfloat16 rounding, another on every processor.
    assert loss_of("none") == pytest.approx(README_LOSS, rel=0.005)


@pytest.mark.parametrize("scheme", grid(["fp8", "int8"], ["fp8"]))
def test_quantization_costs_less_than_one_percent(scheme: str, loss_of: Callable[[str], float]) -> None:
    loss, unquantized = loss_of(scheme), loss_of("none")
    assert loss == pytest.approx(unquantized, rel=0.01)
    assert loss != unquantized


def test_the_loss_would_show_a_wrong_model(build_artifact: Callable[..., Path], windows: list[list[int]]) -> None:
    """The same measure on random weights says that nothing is known: the logarithm of the vocabulary, and more."""
    artifact = build_artifact(
        QUICKSTART / "model",
        seed=1,
        prefill_buckets=[[1, WINDOW + 1]],
        append_buckets=[],
        decode_buckets=[[1, WINDOW + 1]],
        max_seq_len_to_capture=WINDOW + 1,
    )
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (output,) = LLM(artifact).generate([windows[0]], params)
    assert output.prompt_logprobs is not None
    logprobs = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:] if entry]
    assert -torch.tensor(logprobs).mean() > 7.0
