"""The sequences of a beam search, from step to step."""

from __future__ import annotations

from collections.abc import Sequence

from furiosa_build.runtime.request import Request, TokenSequence
from furiosa_build.runtime.sampling.beam_search import Continuation
from furiosa_build.runtime.scheduling.kv_cache import BlockManager


def continue_beams(blocks: BlockManager, request: Request, continuations: Sequence[Continuation]) -> None:
    """Replaces the sequences of a beam search, all of whose tokens are computed, by those that continue them.

    The first that continues a sequence takes its KV blocks, others share them. The blocks of those that nothing
    continues are free, as far as nobody shares them.
    """
    before, after = request.sequences, []
    for continuation in continuations:
        # After the prompt there is one sequence yet, which stands for all beams.
        sequence = before[min(continuation.parent, len(before) - 1)]
        if sequence in after:
            source, sequence = sequence, TokenSequence(list(sequence.tokens))
            blocks.fork(source, sequence, request.num_computed)
        after.append(sequence)
    for sequence in before:
        if sequence not in after:
            blocks.free(sequence)
    for sequence, continuation in zip(after, continuations, strict=True):
        sequence.tokens.append(continuation.token)
    request.sequences = after
