"""The questions that an artifact and transformers are asked: one JSON file, which both read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, cycle, islice
from typing import TYPE_CHECKING

from furiosa_build.artifact.schema import Artifact, GeneratorConfig
from furiosa_build.plan.budget.reference import LENGTHS
from furiosa_build.runtime.probe import Chat, Continuation, Questions
from furiosa_build.steps.qualification.samples import AROUND, CHATS, PASSAGE, TEXTS

if TYPE_CHECKING:
    from furiosa_build.steps.qualification.original import OriginalTokenizer

_CONTINUED = 3
"""Texts that are continued."""
_NEW_TOKENS = 16
"""Tokens that such a text is continued by."""
_FEW_TOKENS = 4
"""Tokens that all other prompts are continued by."""
_SHORT = 24
"""Most tokens of such a text."""
_KEPT = 512
"""Most tokens of a prompt that another one begins with."""
_FLOATING_POINT_OPERATIONS = 3e13
"""About what the reference may spend on long prompts: a minute or so. It is 2 for each parameter and token."""
_NAMED_TOKENS = 40
"""Special tokens that texts are made of."""


def make_questions(artifact: Artifact, tokenizer: OriginalTokenizer | None, longest: int) -> Questions:
    """What is asked about an artifact whose source has this tokenizer, or none. `longest`: tokens of a prompt."""
    config, metadata = artifact.generator_config, artifact.model_metadata
    size = metadata.vocab_size
    pool = list(islice(cycle(passage(None, tokenizer, size)), longest))
    if tokenizer is None:
        short = [[(7919 * (i + 1) * (k + 1)) % size for k in range(8 + 5 * i)] for i in range(_CONTINUED)]
        return Questions(rounds=_rounds(config, metadata.num_parameters, short, pool))
    texts = [*TEXTS, *(form.format(*[token] * 2) for token in tokenizer.named(_NAMED_TOKENS) for form in AROUND)]
    short = [passage(text, tokenizer, size) for text in TEXTS[:_CONTINUED]]
    return Questions(
        texts=texts,
        tokens=[ids for text in texts for ids in (tokenizer.encode(text), tokenizer.encode(text, False))],
        chats=[Chat.model_validate(chat) for chat in CHATS],
        rounds=_rounds(config, metadata.num_parameters, short, pool),
    )


def passage(text: str | None, tokenizer: OriginalTokenizer | None, size: int) -> list[int]:
    """The tokens of a text that are in a vocabulary of this size; without a tokenizer any, spread over it.

    None: the usual text.
    """
    if tokenizer is None:
        return [(7919 * (k + 1) + k // size) % size for k in range(LENGTHS[0])]
    return [token for token in tokenizer.encode(PASSAGE if text is None else text) if token < size] or [0]


def _rounds(
    config: GeneratorConfig, parameters: int, short: Sequence[list[int]], pool: list[int]
) -> list[list[Continuation]]:
    """Prompts that lead through the buckets: short ones, those that fill a bucket, and those that begin alike."""
    room = max(length for _, length in config.decode_buckets)
    longest = room if config.append_buckets else max(length for _, length in config.prefill_buckets)
    cut = max(1, min(max(length for _, length in config.prefill_buckets), room - _NEW_TOKENS, _SHORT))
    few = min(_FEW_TOKENS, room)
    budget = _FLOATING_POINT_OPERATIONS / (2 * parameters)

    def continuation(prompt: list[int], most: int) -> Continuation:
        return Continuation(prompt=prompt, max_tokens=min(most, room - len(prompt) + 1))

    lengths = sorted({min(n, longest, room - few + 1, len(pool)) for n in _lengths(config)})
    affordable = [n for n, total in zip(lengths, accumulate(lengths), strict=True) if n > 0 and total <= budget]
    # Each begins elsewhere, so that none finds its beginning in the cache; those of the last round do.
    long = [(pool[i:] + pool[:i])[:n] for i, n in enumerate(affordable)]
    block = config.paged_attention_block_size
    again = []
    for (_, new, context), prompt in zip(sorted(config.append_buckets), cycle(long[::-1] or short), strict=False):
        kept = min(len(prompt) - 1, context - new, _KEPT) // block * block
        fresh = min(new, context - kept, room - few + 1 - kept)
        if kept > 0 and fresh > 0:
            again.append(prompt[:kept] + pool[-fresh:])
    rounds = [
        [continuation(prompt[:cut], _NEW_TOKENS) for prompt in short],
        [continuation(prompt, few) for prompt in long],
        [continuation(prompt, few) for prompt in again],
    ]
    if (sharing := config.kv_cache_sharing_across_beams_config) is not None:
        most = min(sharing.max_new_tokens, _NEW_TOKENS, room - cut + 1)
        rounds.append([Continuation(prompt=p[:cut], max_tokens=most, beams=sharing.beam_width) for p in short])
    return [one for one in rounds if one]


def _lengths(config: GeneratorConfig) -> Iterator[int]:
    """Lengths of prompts that just fill a prefill bucket, or lead into a decode bucket to its end."""
    yield from (length for _, length in config.prefill_buckets)
    yield from (length - _FEW_TOKENS + 1 for _, length in config.decode_buckets)
