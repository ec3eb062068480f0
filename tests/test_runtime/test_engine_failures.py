"""What fails in a step ends the requests of its batch, and nobody else's text changes."""

from __future__ import annotations

import math
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

import pytest
import torch

from furiosa_build.artifact.reader import OpenArtifact
from furiosa_build.artifact.stages import restage
from furiosa_build.core import failpoints
from furiosa_build.runtime.engine import LLMEngine, StepFailedError
from furiosa_build.runtime.execution.communicator import PeerFailedError
from furiosa_build.runtime.request import RequestOutput

from . import toy
from .stepping import drain, greedy, run, tokens_of


@pytest.mark.parametrize("fails", [False, True])
def test_the_id_of_an_aborted_request_may_be_used_again_while_its_batch_is_under_way(
    opened: OpenArtifact, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Also if that batch fails then."""
    prefill = toy.ToyProgram.prefill

    def failing(self: toy.ToyProgram, hidden: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if fails and hidden.shape == (1, 16):
            raise ValueError("of the aborted request")
        return prefill(self, hidden, *others)

    monkeypatch.setattr(toy.ToyProgram, "prefill", failing)
    in_stages = OpenArtifact(opened.directory, restage(opened.artifact, 2), opened.manifest)
    with closing(LLMEngine(in_stages)) as engine:
        [replica] = engine._replicas
        engine.add_request("again", [5] * 12, greedy())
        replica.fill()
        assert [(r.request_id, len(r.tokens)) for r in replica.scheduler.in_flight] == [("again", 12)]
        engine.abort_request("again")
        engine.add_request("again", [6], greedy())
        engine.check_integrity()
        assert drain(engine)["again"].outputs[0].token_ids == toy.expected([6], 12)


def test_logits_that_nothing_can_be_sampled_from_end_their_request_alone(
    toy_backend: toy.ToyBackend, tmp_path: Path
) -> None:
    del toy_backend
    table = toy.table()
    bad = [1]
    [state] = (row for row in range(toy.P) if torch.equal(table[row], toy.logits_after(bad)))
    table[state] = float("nan")
    engine = LLMEngine(toy.write_artifact(tmp_path / "a", parameters=toy.default_parameters() | {"table": table}))
    for name, prompt in (("a", [2]), ("bad", bad), ("c", [3])):
        engine.add_request(name, prompt, greedy())
    with pytest.raises(StepFailedError, match=r"'bad'(.|\n)*no usable maximum: nan") as raised:
        drain(engine)
    assert list(raised.value.errors) == ["bad"]
    engine.check_integrity()
    outputs = drain(engine)
    assert {name: output.outputs[0].token_ids for name, output in outputs.items()} == {
        "a": toy.expected([2], 12),
        "c": toy.expected([3], 12),
    }


@pytest.mark.parametrize("raises", [False, True])
def test_nobody_begins_with_what_a_failed_request_has_computed(
    toy_backend: toy.ToyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raises: bool
) -> None:
    """Its last step gives NaN, or fails. The first piece of its prompt had run, as had a request that began alike."""
    del toy_backend
    buckets = {"prefill": [(1, 16)], "append": [(1, 4, 48)], "decode": [(4, 48)]}
    engine = LLMEngine(toy.write_artifact(tmp_path / "a", toy.artifact_data(buckets, block_size=4)))
    begins, bad = list(range(12)), list(range(20))
    assert run(engine, begins, greedy()).outputs[0].token_ids == toy.expected(begins, 12)
    engine.add_request("bad", bad, greedy())
    engine.step()
    with monkeypatch.context() as patch:
        if raises:
            patch.setenv(failpoints.VARIABLE, "request:bad@step=errno:EIO")
        else:
            patch.setattr(toy.ToyProgram, "last", lambda _, hidden, table: table[hidden] * math.nan)
        with pytest.raises(StepFailedError):
            drain(engine)
    again = run(engine, bad, greedy())
    assert (again.num_cached_tokens, again.outputs[0].token_ids) == (0, toy.expected(bad, 12))
    assert run(engine, bad, greedy()).num_cached_tokens == 16


def test_a_program_that_fails_ends_the_requests_of_its_batch_alone(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefill of a long prompt fails; requests before and after it give their whole text."""
    prefill = toy.ToyProgram.prefill

    def failing(self: toy.ToyProgram, hidden: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if hidden.shape == (1, 16):
            raise ValueError("a bad kernel")
        return prefill(self, hidden, *others)

    monkeypatch.setattr(toy.ToyProgram, "prefill", failing)
    engine.add_request("before", [1], greedy())
    engine.step()
    engine.add_request("bad", [5] * 12, greedy())
    engine.add_request("after", [2], greedy())
    with pytest.raises(StepFailedError, match="a bad kernel") as raised:
        engine.step()
    assert list(raised.value.errors) == ["bad"]
    assert isinstance(raised.value.__cause__, ValueError)
    engine.check_integrity()
    outputs = drain(engine)
    assert {name: output.outputs[0].token_ids for name, output in outputs.items()} == {
        "before": toy.expected([1], 12),
        "after": toy.expected([2], 12),
    }
    blocks = engine._replicas[0].scheduler.blocks
    assert blocks.num_free == blocks.num_blocks


@pytest.mark.parametrize("failing", ["first", "last"])
def test_a_stage_that_fails_ends_the_requests_of_its_batch_alone(
    opened: OpenArtifact, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Batches that were under way behind it run again; nothing of it is left between the stages."""
    work = getattr(toy.ToyProgram, failing)
    runs = 0

    def sometimes(self: toy.ToyProgram, first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        if runs in (2, 7, 20):
            raise ValueError(f"run {runs}")
        return work(self, first, *others)

    monkeypatch.setattr(toy.ToyProgram, failing, sometimes)
    in_stages = OpenArtifact(opened.directory, restage(opened.artifact, 2), opened.manifest)
    with closing(LLMEngine(in_stages)) as engine:
        prompts = {f"{n}": [n, 7] for n in range(12)}
        for name, prompt in prompts.items():
            engine.add_request(name, prompt, greedy())
        outputs: dict[str, RequestOutput] = {}
        failed: dict[str, Exception] = {}
        while engine.has_unfinished_requests():
            try:
                stepped = engine.step()
            except StepFailedError as error:
                failed |= error.errors
                stepped = error.outputs
            outputs.update((output.request_id, output) for output in stepped if output.finished)
            engine.check_integrity()
        assert {str(error) for error in failed.values()} == {"run 2", "run 7", "run 20"}
        assert outputs.keys() | failed.keys() == prompts.keys()
        assert not outputs.keys() & failed.keys()
        assert len(outputs) >= 3
        for name, output in outputs.items():
            assert output.outputs[0].token_ids == toy.expected(prompts[name], 12)
        blocks = engine._replicas[0].scheduler.blocks
        assert blocks.num_free == blocks.num_blocks


def test_of_several_batches_the_one_that_failed_first_is_the_one_that_ends(
    opened: OpenArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of an earlier batch may break off on account of a later one."""
    in_stages = OpenArtifact(opened.directory, restage(opened.artifact, 2), opened.manifest)
    with closing(LLMEngine(in_stages)) as engine:
        [replica] = engine._replicas
        earlier: Future[torch.Tensor] = Future()
        later: Future[torch.Tensor] = Future()
        earlier.set_exception(PeerFailedError("another rank has failed"))
        later.set_exception(ValueError("a bad kernel"))
        futures = [earlier, later]
        for name, length in (("a", 3), ("bad", 12), ("c", 3)):
            engine.add_request(name, [5] * length, greedy())
        with monkeypatch.context() as patch:
            patch.setattr(replica.executor, "submit", lambda *_: futures.pop(0))
            with pytest.raises(StepFailedError, match="a bad kernel") as raised:
                engine.step()
        assert list(raised.value.errors) == ["bad"]
        outputs = drain(engine)
        assert tokens_of(outputs) == [toy.expected([5] * 3, 12)] * 2
