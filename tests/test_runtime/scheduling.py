"""A scheduler with a model of its own, whose tokens are wrong as soon as a KV slot is."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest

from furiosa_build.artifact.schema import Pipeline
from furiosa_build.core.errors import UserError
from furiosa_build.runtime.request import Request, TokenSequence
from furiosa_build.runtime.sampling.beam_search import BeamSearch
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.scheduling.batch import Batch
from furiosa_build.runtime.scheduling.beams import continue_beams
from furiosa_build.runtime.scheduling.kv_cache import BlockManager
from furiosa_build.runtime.scheduling.scheduler import Scheduler
from furiosa_build.runtime.text.detokenizer import OutputText

Buckets = Sequence[tuple[int, ...]]
"""Of a phase: batch, new tokens where the phase is append, context."""


def pipelines(prefill: Buckets, decode: Buckets, append: Buckets = ()) -> list[Pipeline]:
    made = []
    for phase, buckets in (("prefill", prefill), ("append", append), ("decode", decode)):
        for size in buckets:
            batch, *new, length = size
            fields = {
                "name": f"{phase}-{'x'.join(map(str, size))}",
                "phase": phase,
                "batch_size": batch,
                "query_length": new[0] if new else length if phase == "prefill" else 1,
                "context_length": length,
                "supertasks": [],
            }
            made.append(Pipeline.model_validate(fields))
    return made


def request(name: str, prompt: int | Sequence[int], max_tokens: int | None = 4) -> Request:
    tokens = list(range(1, prompt + 1)) if isinstance(prompt, int) else list(prompt)
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    return Request(request_id=name, prompt=None, prompt_token_ids=tokens, params=params, text=OutputText(None, ()))


def beam_request(name: str, prompt: int | Sequence[int], max_tokens: int = 4, width: int = 2) -> Request:
    made = request(name, prompt, max_tokens)
    made.beams = BeamSearch(width, max_tokens)
    return made


def next_token(tokens: Sequence[int]) -> int:
    """The model: any function of all tokens and their places."""
    return sum((token + 1) * (place + 1) for place, token in enumerate(tokens)) % 101


def beam_logits(tokens: Sequence[int]) -> list[float]:
    """Of the same model, for beam searches."""
    state = next_token(tokens)
    return [(state + 7) * (token + 3) * (token + 5) % 31 / 5 for token in range(8)]


class Runner:
    """A scheduler with the model above. KV storage remembers what was written where: a token after those before it."""

    def __init__(
        self,
        prefill: Buckets,
        decode: Buckets,
        append: Buckets = (),
        *,
        num_blocks: int,
        block_size: int = 1,
        spare_blocks_ratio: float = 0.0,
        prefill_chunk_size: int | None = None,
        is_offline: bool = False,
        enable_prefix_caching: bool = True,
        num_stages: int = 1,
    ) -> None:
        self.scheduler = Scheduler(
            pipelines(prefill, decode, append),
            BlockManager(num_blocks, block_size),
            spare_blocks_ratio=spare_blocks_ratio,
            prefill_chunk_size=prefill_chunk_size,
            is_offline=is_offline,
            enable_prefix_caching=enable_prefix_caching,
            num_stages=num_stages,
        )
        self.num_stages = num_stages
        self.in_flight: deque[Batch] = deque()
        self.storage: dict[int, list[int]] = {}
        self.finished: dict[str, list[int] | list[list[int]]] = {}

    def step(self) -> Batch | None:
        """Fills the stages, and ends the batch that is in the last one: they run one after the other."""
        while len(self.in_flight) < self.num_stages and (batch := self.scheduler.schedule()) is not None:
            self._check_fits(batch)
            names = [request.request_id for each in (*self.in_flight, batch) for request in each.requests]
            assert len(set(names)) == len(names), "a request is in two batches"
            self.in_flight.append(batch)
        if not self.in_flight:
            return None
        batch = self.in_flight.popleft()
        for request, count in zip(batch.requests, batch.counts, strict=True):
            for sequence in batch.sequences(request):
                self._write(request, sequence, count)
            for sequence in batch.sequences(request):
                self._check_reads(request, sequence, count)
        for request in self.scheduler.advance(batch):
            if request.beams is not None:
                self._step_beams(request, request.beams)
            else:
                request.tokens.append(next_token(request.tokens))
                self._finish_if_due(request)
        self.scheduler.check_integrity()
        return batch

    def run_all(self) -> list[str]:
        """Steps until nothing is left. Returns the names of the buckets that ran."""
        names = []
        while (batch := self.step()) is not None:
            names.append(batch.pipeline.name)
            assert len(names) < 20_000, "no progress"
        assert self.scheduler.num_unfinished == 0
        return names

    def _check_fits(self, batch: Batch) -> None:
        assert 1 <= sum(len(batch.sequences(request)) for request in batch.requests) <= batch.pipeline.batch_size
        assert len(set(batch.requests)) == len(batch.requests)
        for request, count in zip(batch.requests, batch.counts, strict=True):
            assert 1 <= count <= batch.pipeline.query_length
            assert request.num_computed + count <= batch.pipeline.context_length
            if batch.pipeline.phase == "prefill":
                assert request.num_computed == 0
            in_prompt = request.num_computed + count <= len(request.prompt_token_ids)
            assert in_prompt == (batch.pipeline.phase != "decode")

    def _write(self, request: Request, sequence: TokenSequence, count: int) -> None:
        slots = self.scheduler.blocks.slots(sequence).tolist()
        for position in range(request.num_computed, request.num_computed + count):
            self.storage[slots[position]] = sequence.tokens[: position + 1]

    def _check_reads(self, request: Request, sequence: TokenSequence, count: int) -> None:
        end = request.num_computed + count
        read = [self.storage[slot] for slot in self.scheduler.blocks.slots(sequence)[:end].tolist()]
        assert read == [sequence.tokens[: place + 1] for place in range(end)]

    def _step_beams(self, request: Request, beams: BeamSearch) -> None:
        logits = np.array([beam_logits(sequence.tokens) for sequence in request.sequences], dtype=np.float32)
        continuations = beams.step(logits)
        if beams.is_done:
            self.scheduler.remove(request)
            self.finished[request.request_id] = [beam.tokens for beam in beams.finished]
        else:
            continue_beams(self.scheduler.blocks, request, continuations)

    def _finish_if_due(self, request: Request) -> None:
        limit = self.scheduler.max_context
        if request.num_generated == request.params.max_tokens or len(request.tokens) > limit:
            self.scheduler.remove(request)
            self.finished[request.request_id] = request.output_token_ids


def continuation(prompt: Sequence[int], number: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(number):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def best_beams(prompt: Sequence[int], number: int, width: int = 2) -> list[list[int]]:
    beams, sequences = BeamSearch(width, number), [list(prompt)]
    while True:
        found = beams.step(np.array([beam_logits(sequence) for sequence in sequences], dtype=np.float32))
        if beams.is_done:
            return [beam.tokens for beam in beams.finished]
        sequences = [[*sequences[min(c.parent, len(sequences) - 1)], c.token] for c in found]


def steps(runner: Runner) -> list[list[tuple[str, int]]]:
    """What runs in each step: (request, tokens)."""
    found = []
    while (batch := runner.step()) is not None:
        found.append([(r.request_id, n) for r, n in zip(batch.requests, batch.counts, strict=True)])
    return found


def refused(runner: Runner, prompt: int, max_tokens: int | None, message: str) -> None:
    before = runner.scheduler.num_unfinished
    with pytest.raises(UserError, match=message):
        runner.scheduler.add(request("refused", prompt, max_tokens))
    assert runner.scheduler.num_unfinished == before
