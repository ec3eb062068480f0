"""Section `buckets`: which shapes are compiled, and the KV cache that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ModelWrapValidatorHandler, field_validator, model_validator

from furiosa_build.ir.kv_cache import KvCacheDtype
from furiosa_build.recipe.schema.section import PositiveInt, Section, as_tuple, invalid

DEFAULT_MAX_SEQ_LEN = 2048
"""Of a recipe that does not say; of a model that takes no more, its own (`recipe.lengths`)."""
Phase = Literal["prefill", "append", "decode"]


def _lists_of(*numbers: str, example: str) -> Callable[[Any], Any]:
    """A validator that converts lists of whole numbers to tuples and refuses anything else with one message."""

    def check(value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise invalid(f"{value!r} is not a list of buckets", valid=f"a list such as [{example}]")
        for index, item in enumerate(value):
            fits = isinstance(item, list | tuple) and len(item) == len(numbers)
            if not (fits and all(type(number) is int and number >= 1 for number in item)):
                shown = list(item) if isinstance(item, tuple) else item
                valid = f"{len(numbers)} whole numbers of at least 1, such as {example}"
                raise invalid(f"the bucket {shown!r} is not [{', '.join(numbers)}]", key=(index,), valid=valid)
        return as_tuple(value)

    return check


BucketSize = tuple[int, int]
"""(batch size, context length in tokens)."""
AppendSize = tuple[int, int, int]
"""(batch size, new tokens of each sequence, context length in tokens, the new ones included)."""
_pairs = _lists_of("batch", "length", example="[1, 128]")
_triples = _lists_of("batch", "new tokens", "context", example="[1, 64, 512]")
BucketSizes = Annotated[tuple[BucketSize, ...], BeforeValidator(_pairs)]
AppendSizes = Annotated[tuple[AppendSize, ...] | None, BeforeValidator(_triples)]


class KvCacheSharing(Section):
    """Beam searches of `beam_width` beams, of at most `max_new_tokens` tokens each after their common prompt."""

    beam_width: PositiveInt
    max_new_tokens: PositiveInt


class BucketSpec(Section):
    """Static shapes that are compiled, and the KV cache they share.

    A prefill bucket (batch, length) runs `batch` prompts of up to `length` tokens. A decode bucket runs one
    new token of `batch` sequences over contexts of up to `length` tokens. An append bucket (batch, new tokens,
    context) runs several new tokens of each: a piece of a prompt, or what is left of one whose beginning is cached.
    None: see `derive_append_buckets`.
    `paged_attention_num_blocks` (KV blocks per layer) is by default what the largest decode bucket fills, or fewer
    where the target's memory is too small (`plan.kv_blocks`). `kv_cache_dtype`: what they hold (`ir.kv_cache`). With
    `kv_cache_sharing_across_beams_config` a decode bucket (batch, length) is for `batch` beam searches: it is compiled
    with a row for each beam, and full when each search has a prompt and its beams' own tokens.
    """

    prefill_buckets: BucketSizes = ()
    decode_buckets: BucketSizes = ()
    append_buckets: AppendSizes = None
    max_seq_len_to_capture: PositiveInt = DEFAULT_MAX_SEQ_LEN
    paged_attention_num_blocks: PositiveInt | None = None
    paged_attention_block_size: PositiveInt = 1
    kv_cache_dtype: KvCacheDtype = "auto"
    kv_cache_sharing_across_beams_config: KvCacheSharing | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _default_buckets(cls, data: Any, make: ModelWrapValidatorHandler[BucketSpec]) -> BucketSpec:
        """Buckets that are not given have the longest sequence; they stay out of `model_fields_set`."""
        derived = {}
        if isinstance(data, dict) and type(length := data.get("max_seq_len_to_capture", DEFAULT_MAX_SEQ_LEN)) is int:
            names = ("prefill_buckets", "decode_buckets")
            derived = {name: ((1, length),) for name in names if data.get(name) in (None, [], ())}
            data = {**data, **derived}
        made = make(data)
        made.model_fields_set.difference_update(derived)
        return made

    @field_validator("prefill_buckets", "decode_buckets", "append_buckets")
    @classmethod
    def _sorted_and_unique(cls, buckets: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        ordered = tuple(sorted(set(buckets or ())))
        if buckets is not None and buckets != ordered:
            found, valid = ([list(bucket) for bucket in each] for each in (buckets, ordered))
            raise invalid(f"the buckets {found} are not sorted and unique", valid=str(valid))
        return buckets

    @model_validator(mode="after")
    def _within_max_seq_len(self) -> BucketSpec:
        limit = self.max_seq_len_to_capture
        for key in ("prefill_buckets", "decode_buckets", "append_buckets"):
            for index, bucket in enumerate(getattr(self, key) or ()):
                if bucket[-1] > limit:
                    what = f"the bucket {list(bucket)} is longer than max_seq_len_to_capture={limit}"
                    raise invalid(what, key=(key, index), valid=f"lengths of at most {limit}")
        for index, bucket in enumerate(self.append_buckets or ()):
            _, new, context = bucket
            if new >= context:
                what = f"the bucket {list(bucket)} leaves no context before its {new} new tokens"
                raise invalid(what, key=("append_buckets", index), valid=f"at most {context - 1} new tokens")
        return self

    @model_validator(mode="after")
    def _beams_fit(self) -> BucketSpec:
        beams, longest = self.kv_cache_sharing_across_beams_config, max(length for _, length in self.decode_buckets)
        if beams is not None and beams.max_new_tokens > longest:
            what = f"max_new_tokens={beams.max_new_tokens} is more than the longest decode bucket holds"
            key = ("kv_cache_sharing_across_beams_config", "max_new_tokens")
            raise invalid(what, key=key, valid=f"1 to {longest}")
        return self

    @model_validator(mode="after")
    def _one_sequence_fits(self) -> BucketSpec:
        given = self.paged_attention_num_blocks
        if given is not None and given < self.least_blocks:
            longest = max(length for _, length in self.decode_buckets)
            room = given * self.paged_attention_block_size
            what = f"paged_attention_num_blocks={given} hold {room} tokens, but a sequence has up to {longest}"
            raise invalid(what, key=("paged_attention_num_blocks",), valid=f"at least {self.least_blocks}")
        return self

    @property
    def compiled_decode_buckets(self) -> tuple[BucketSize, ...]:
        """The decode buckets with a row for each beam."""
        beams = self.kv_cache_sharing_across_beams_config
        return tuple((batch * (beams.beam_width if beams else 1), length) for batch, length in self.decode_buckets)

    @property
    def needed_blocks(self) -> int:
        """KV blocks per layer that the largest decode bucket fills."""
        return max(batch * self._blocks_of_one(length) for batch, length in self.decode_buckets)

    @property
    def least_blocks(self) -> int:
        """KV blocks per layer that one sequence of the longest decode bucket fills."""
        return max(self._blocks_for(length) for _, length in self.decode_buckets)

    def _blocks_of_one(self, length: int) -> int:
        """KV blocks per layer of a sequence of `length` tokens, or of a beam search of such sequences."""
        if (beams := self.kv_cache_sharing_across_beams_config) is None:
            return self._blocks_for(length)
        # A beam that branches off takes a new block, so each token may have one of its own.
        return self._blocks_for(length - beams.max_new_tokens) + beams.beam_width * beams.max_new_tokens

    def _blocks_for(self, length: int) -> int:
        return -(-length // self.paged_attention_block_size)


def derive_append_buckets(
    buckets: BucketSpec, chunk_size: int | None, proposed: int | None = None
) -> tuple[AppendSize, ...]:
    """The append buckets of a recipe that lists none: for prompts, and for `proposed` tokens to be verified.

    To verify, each decode bucket has one of its batch and context, for the last token and those proposed after it.
    """
    rows = () if proposed is None else buckets.compiled_decode_buckets
    verifying = ((batch, (proposed or 0) + 1, context) for batch, context in rows)
    return tuple(sorted({*_buckets_of_prompts(buckets, chunk_size), *verifying}))


def _buckets_of_prompts(buckets: BucketSpec, chunk_size: int | None) -> tuple[AppendSize, ...]:
    """The append buckets for prompts: two at most, since each costs programs to compile.

    They run a single sequence over the largest decode context. A short one is for what is left of a prompt whose
    beginning is cached: as the shortest prefill bucket, or a quarter of it where there is no other prefill length. A
    long one is for the pieces of a prompt: as the longest prefill bucket within the context, or as a chunk where
    pieces are chunks of at most `chunk_size` tokens.
    """
    context = max(length for _, length in buckets.decode_buckets)
    all_lengths = sorted({length for _, length in buckets.prefill_buckets})
    lengths = [length for length in all_lengths if length < context]
    if chunk_size is not None and chunk_size < context:
        lengths = [*(length for length in lengths if length < chunk_size), chunk_size]
    elif len(all_lengths) == 1:
        lengths = [min(max(1, all_lengths[0] // 4), context - 1)]
    return tuple((1, length, context) for length in sorted({*lengths[:1], *lengths[-1:]}) if length > 0)


def bucket_name(phase: Phase, size: Sequence[int]) -> str:
    """`prefill-1x512`, `append-1x64x512`: the name of a bucket in task names, reports and the artifact."""
    return f"{phase}-{'x'.join(map(str, size))}"
