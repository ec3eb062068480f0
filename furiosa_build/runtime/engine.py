"""The engine: requests in, a step at a time, outputs out. A step schedules, runs and samples."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from furiosa_build.artifact.reader import OpenArtifact
from furiosa_build.artifact.schema import Artifact
from furiosa_build.artifact.signing import open_signed
from furiosa_build.backends.device import as_float32
from furiosa_build.core.errors import BuildError, EngineFullError, UserError
from furiosa_build.runtime.engine_args import EngineArgs
from furiosa_build.runtime.execution.communicator import DistributedCommunicator
from furiosa_build.runtime.execution.rank import StepOutputs
from furiosa_build.runtime.execution.replica import Replica, make_replica, thread_shares
from furiosa_build.runtime.input_processor import InputProcessor
from furiosa_build.runtime.parallel_sampling import ParallelRequests, split
from furiosa_build.runtime.pooling import PoolingParams, embed
from furiosa_build.runtime.prompts import Prompt
from furiosa_build.runtime.request import Request, RequestOutput
from furiosa_build.runtime.sampling.next_token import NextToken, OnLogits
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.sampling.selection import Floats
from furiosa_build.runtime.scheduling.batch import Batch
from furiosa_build.runtime.scheduling.beams import continue_beams
from furiosa_build.runtime.stats import EngineStats
from furiosa_build.runtime.text.tokenizer import Tokenizer


class StepFailedError(BuildError):
    """A step failed for some requests, which are no longer under way. The others go on.

    Attributes:
        errors: Request id -> the cause.
        outputs: The outputs of the step's other requests.
    """

    def __init__(self, errors: Mapping[str, Exception], outputs: Sequence[RequestOutput] = ()) -> None:
        self.errors, self.outputs = dict(errors), list(outputs)
        named = ", ".join(map(repr, self.errors))
        super().__init__(f"a step failed for request {named}: {next(iter(self.errors.values()))}")


class LLMEngine:
    """Generates for many requests at once. To be used by one thread.

    Args:
        artifact: Directory of an artifact, or an opened one.
        paged_attention_num_blocks: KV blocks per layer; the artifact's default if None.
        seed: Seed of the requests that have none of their own; drawn if None.
        verify: How thoroughly to verify a directory (see `open_artifact`).
        public_key: PEM file of the key that the artifact must be signed with; None: it need not be signed.
        on_logits: Called with the request id and the float32 logits [vocab] of every position that is sampled
            from; of a beam search, of every beam.
        communicator: When every rank is a process of its own: this one's end. Every process has an engine then, with
            the same `seed`, and calls its methods in the same order; every one gets the outputs.
        tokenizer: Directory with the files of another tokenizer than the artifact's.
        enable_prefix_caching: Whether requests share the KV blocks of tokens that they begin with alike.
        num_threads: Threads that compute, of all ranks, stages and replicas together; None: those that this process may
            keep busy. With one rank they are those of the thread that makes the engine and takes its steps.
        pin_threads: Whether each rank's threads run on cores of their own.

    Attributes:
        artifact: What artifact.json says, with what EngineArgs override.
        tokenizer: None if the artifact has none, and then the engine takes and gives token ids only.

    Raises:
        UserError: The artifact cannot be used, or an argument is out of range.
        VerificationError: The artifact is not signed with `public_key`.
    """

    def __init__(
        self,
        artifact: str | Path | OpenArtifact,
        *,
        paged_attention_num_blocks: int | None = None,
        seed: int | None = None,
        verify: Literal["fast", "full"] = "fast",
        public_key: str | Path | None = None,
        on_logits: OnLogits | None = None,
        communicator: DistributedCommunicator | None = None,
        tokenizer: str | Path | None = None,
        enable_prefix_caching: bool = True,
        num_threads: int | None = None,
        pin_threads: bool = False,
    ) -> None:
        opened = open_signed(artifact, public_key, verify)
        self.artifact = opened.artifact
        _refuse_unusable_buckets(self.artifact)
        config = self.artifact.generator_config
        num_blocks = (
            config.paged_attention_num_blocks if paged_attention_num_blocks is None else paged_attention_num_blocks
        )
        if num_blocks < 1:
            raise UserError(f"{num_blocks} KV blocks", where="paged_attention_num_blocks", valid=">= 1")
        self._replicas: list[Replica] = []
        for shares in thread_shares(opened, num_threads, pin_threads, communicator):
            like = self._replicas[0] if self._replicas else None
            self._replicas.append(make_replica(opened, num_blocks, communicator, enable_prefix_caching, shares, like))
        self._max_samples = config.default_scheduler_config.max_processing_samples
        model = opened.directory / "model"
        self.tokenizer = _tokenizer(model if tokenizer is None else Path(tokenizer), is_asked=tokenizer is not None)
        scheduler = self._replicas[0].scheduler
        longest, max_context = scheduler.max_prompt_tokens, scheduler.max_context
        self._inputs = InputProcessor(self.artifact, model, self.tokenizer, seed, longest, max_context)
        self._next = NextToken(self.tokenizer, max_context, on_logits)
        self._requests: dict[str, Request] = {}
        self._replica_of: dict[str, Replica] = {}
        self._parallel = ParallelRequests()

    @classmethod
    def from_engine_args(
        cls,
        args: EngineArgs,
        *,
        verify: Literal["fast", "full"] = "fast",
        on_logits: OnLogits | None = None,
        opened: OpenArtifact | None = None,
    ) -> Self:
        """The engine of these arguments; `opened` is what `args.open` gives, if that has been called.

        Raises:
            UserError: As of the constructor and of `EngineArgs.open`.
            VerificationError: As of `EngineArgs.open`.
        """
        return cls(
            args.open(verify) if opened is None else opened,
            seed=args.seed,
            on_logits=on_logits,
            tokenizer=args.tokenizer,
            enable_prefix_caching=args.enable_prefix_caching,
            num_threads=args.num_threads,
            pin_threads=args.pin_threads,
        )

    @property
    def is_full(self) -> bool:
        """Whether `max_processing_samples` requests are under way, so that add_request takes no more."""
        return len(self._requests) >= self._max_samples

    def add_request(self, request_id: str, prompt: Prompt, sampling_params: SamplingParams | PoolingParams) -> None:
        """Queues a request: with PoolingParams for the embedding of its prompt, else for its completion.

        Raises:
            EngineFullError: `max_processing_samples` requests are under way.
            WrongTypeError: A TypeError and a UserError: what is no request id, prompt or SamplingParams.
            UserError: The id is in use; the prompt is empty, too long or has unknown tokens; messages that the chat
                template rejects; parameters that the artifact cannot serve.
        """
        if self.is_full:
            raise EngineFullError(self._max_samples)
        requests = [self._inputs.process(*part) for part in self._parts(request_id, prompt, sampling_params)]
        for request in requests:
            # The one with the most free blocks; of equals the one with the fewest requests.
            replica = max(self._replicas, key=lambda r: (r.scheduler.blocks.num_free, -r.scheduler.num_unfinished))
            replica.scheduler.add(request)
            self._requests[request.request_id] = request
            self._replica_of[request.request_id] = replica
        self._parallel.add(request_id, [request.request_id for request in requests])

    def _parts(
        self, request_id: str, prompt: Prompt, params: SamplingParams | PoolingParams
    ) -> Iterator[tuple[str, Prompt, SamplingParams | PoolingParams]]:
        for id_, each in split(request_id, params):
            if isinstance(request_id, str) and any(
                i in self._requests or i in self._parallel for i in (request_id, id_)
            ):
                raise UserError(f"request id {request_id!r} is in use", where="request_id", valid="one not in use")
            yield id_, prompt, each

    def prepare_guides(self) -> None:
        """Spares the first request with structured output a wait of up to a second (see `Guides.prepare`)."""
        self._inputs.guides.prepare()

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """Drops requests, which then have no further output. Unknown ids are ignored."""
        for id_ in [request_id] if isinstance(request_id, str) else list(request_id):
            for part in self._parallel.parts_of(id_):
                if part in self._requests:
                    self._drop(self._requests[part])
            self._parallel.drop(id_)

    def step(self) -> list[RequestOutput]:
        """Runs a batch of each replica. Returns the state of every request that got a token; empty if none did.

        A beam search has an output when it is finished, and none before.

        Where stages and ranks are threads, further batches run meanwhile: up to `npu_queue_limit`.

        Raises:
            StepFailedError: For some requests, which are no longer under way: a program failed, or gave logits that
                nothing can be sampled from. The next call goes on with the others.
        """
        for replica in self._replicas:
            replica.fill()
        outputs: list[RequestOutput] = []
        failures: dict[Request, Exception] = {}
        for replica in self._replicas:
            if replica.in_flight:
                try:
                    batch, results = replica.finish()
                except Exception as error:
                    failures |= replica.recover(error)
                else:
                    failures |= self._accept(replica, batch, results, outputs)
        # Some may have been aborted since their batch was submitted, and their id may be in use again.
        failed = {
            self._parallel.request_of(r.request_id): error
            for r, error in failures.items()
            if self._requests.get(r.request_id) is r
        }
        given = [output for output in self._parallel.merge(outputs) if output.request_id not in failed]
        self.abort_request(failed)
        if failed:
            raise StepFailedError(failed, given) from next(iter(failed.values()))
        return given

    def close(self) -> None:
        """Ends the threads of stages and ranks. The engine cannot be used afterwards."""
        for replica in self._replicas:
            replica.close()

    def require_tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer. Raises UserError if it has none."""
        return self._inputs.require_tokenizer()

    def stats(self) -> EngineStats:
        """Counts of all replicas since they were loaded, and their present load."""
        first, *others = (replica.stats() for replica in self._replicas)
        return sum(others, start=first)

    def check_integrity(self) -> None:
        """Raises RuntimeError when the engine's internal state is inconsistent.

        With the environment variable FURIOSA_DEBUG=1 an engine calls this whenever it has no request left.
        """
        for replica in self._replicas:
            replica.check_integrity()
        if len(self._requests) != sum(replica.scheduler.num_unfinished for replica in self._replicas):
            raise RuntimeError("the requests of engine and schedulers are inconsistent")

    # A batch runs

    def _drop(self, request: Request) -> None:
        replica = self._replica_of.pop(request.request_id)
        replica.scheduler.remove(request)
        if replica.drafter is not None:
            replica.drafter.forget(request)
        del self._requests[request.request_id]
        if not self._requests and os.environ.get("FURIOSA_DEBUG") == "1":
            self.check_integrity()

    def _accept(
        self, replica: Replica, batch: Batch, given: StepOutputs, outputs: list[RequestOutput]
    ) -> dict[Request, Exception]:
        """Continues every request of the batch that has run all its tokens. Returns those for which that failed."""
        complete = set(replica.scheduler.advance(batch))
        failed: dict[Request, Exception] = {}
        first_row = 0
        for request, count in zip(batch.requests, batch.counts, strict=True):
            rows = given.logits[first_row : first_row + len(batch.sequences(request))]
            # Artifacts that return the logits of the last token only have one position a sequence.
            end = min(count, rows.shape[1])
            hidden = None if given.last_hidden_state is None else given.last_hidden_state[first_row, end - 1]
            first_row += len(rows)
            try:
                proposed = len(request.proposals)
                if request.params.prompt_logprobs is not None and not proposed:
                    self._next.add_prompt_logprobs(request, request.num_computed - count, rows[0, :count])
                if request in complete and request.pooling is not None:
                    assert hidden is not None
                    request.embedding, request.finish_reason = embed(hidden, request.pooling), "stop"
                elif request in complete:
                    self._continue(replica, request, as_float32(rows[:, end - 1 - proposed : end]))
            except Exception as error:  # of this request alone
                failed[request] = error
                # Its tokens may have keys and values that are NaN, with which others would fail as well.
                if self._requests.get(request.request_id) is request:
                    replica.scheduler.invalidate_cache(request)
                continue
            if request.finished:
                self._drop(request)
            if request in complete and (request.finished or request.beams is None):
                outputs.append(request.output())
        return failed

    def _continue(self, replica: Replica, request: Request, logits: Floats) -> None:
        """Gives a request its next tokens. `logits` is float32 [sequences, positions, vocab]."""
        if request.beams is None:
            replica.proposals += bool(request.proposals)
            replica.proposed_tokens += len(request.proposals)
            replica.accepted_tokens += self._next.choose(request, logits[0])
        elif continuations := self._next.step_beams(request, logits[:, -1]):
            continue_beams(replica.scheduler.blocks, request, continuations)


def _tokenizer(directory: Path, *, is_asked: bool) -> Tokenizer | None:
    if (directory / "tokenizer.json").is_file():
        return Tokenizer(directory)
    if is_asked:
        what = f"{directory} has no tokenizer.json, and nothing is downloaded when an artifact is loaded"
        raise UserError(what, where="tokenizer", valid="a directory with tokenizer.json")
    return None


def _refuse_unusable_buckets(artifact: Artifact) -> None:
    """Raises UserError when beams do not fill decode batches."""
    config = artifact.generator_config.kv_cache_sharing_across_beams_config
    decode = [pipeline for pipeline in artifact.pipelines if pipeline.phase == "decode"]
    if config is None or (decode and all(p.batch_size % config.beam_width == 0 for p in decode)):
        return
    buckets = ", ".join(pipeline.name for pipeline in decode) or "none"
    raise UserError(
        f"the artifact is for beams of {config.beam_width}, and its decode buckets are {buckets}",
        where="kv_cache_sharing_across_beams_config",
        valid=f"decode batches that are multiples of {config.beam_width}",
    )
