"""What a run of a bucket is fed with: the rows of a batch, laid out as the tensors that its pipeline reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from furiosa_build.artifact.schema import Pipeline
from furiosa_build.backends.device import Device
from furiosa_build.runtime.scheduling.kv_cache import Slots


@dataclass(frozen=True)
class Row:
    """One sequence's part of a run.

    Attributes:
        tokens: The new tokens; their keys and values are written.
        start: Position of the first of them: how many tokens of the sequence are computed already.
        slots: KV slots of the sequence's tokens from position 0 on, the new ones included. int64 [>= start +
            new].
    """

    tokens: Sequence[int]
    start: int
    slots: Slots


class InputBuffers:
    """The tensors of a device that the runtime feeds into a pipeline, allocated once and overwritten at every step.

    `tensors` has those of the following that the pipeline reads (B, T, L: batch, query and context length;
    int64): input_ids, position_ids, slot_mapping [B, T]; context_slots [B, L]; context_lens, logits_indices
    [B]; rank [1].
    """

    def __init__(self, pipeline: Pipeline, device: Device[Any], rank: int = 0) -> None:
        batch, query, context = pipeline.batch_size, pipeline.query_length, pipeline.context_length
        shapes: Mapping[str, tuple[int, ...]] = {
            "input_ids": (batch, query),
            "position_ids": (batch, query),
            "slot_mapping": (batch, query),
            "context_slots": (batch, context),
            "context_lens": (batch,),
            "logits_indices": (batch,),
            "rank": (1,),
        }
        read = {name for supertask in pipeline.supertasks for name in supertask.inputs.values()}
        self._arrays: dict[str, NDArray[np.int64]] = {
            name: np.zeros(shape, dtype=np.int64) for name, shape in shapes.items()
        }
        self._rank = rank
        self._positions = np.arange(context, dtype=np.int64)
        self.tensors = {name: device.from_numpy(array) for name, array in self._arrays.items() if name in read}

    def fill(self, rows: Sequence[Row]) -> None:
        """Lays `rows` out; what is left over is padding: token 0 at position 0, written to slot 0.

        Only padding reads slot 0: it may hold NaN, from the padding of a request whose tokens give that, and masked
        values take part in products. A row's context is filled up with its own first slot.
        """
        arrays = self._arrays
        for array in arrays.values():
            array.fill(0)
        arrays["context_lens"].fill(1)
        arrays["rank"].fill(self._rank)
        for index, row in enumerate(rows):
            new = len(row.tokens)
            end = row.start + new
            arrays["input_ids"][index, :new] = row.tokens
            arrays["position_ids"][index, :new] = self._positions[row.start : end]
            arrays["slot_mapping"][index, :new] = row.slots[row.start : end]
            arrays["context_slots"][index, :end] = row.slots[:end]
            arrays["context_slots"][index, end:] = row.slots[0]
            arrays["context_lens"][index] = end
            arrays["logits_indices"][index] = new - 1
