"""Programs made by hand: every tensor of torch is a buffer of its own."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from furiosa_build.backends.native.library import Library
from furiosa_build.backends.native.operators import OPERATORS

DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.int8: 6,
    torch.uint8: 7,
    torch.float8_e4m3fn: 7,
    torch.bool: 8,
}
MOST_DIMENSIONS = 8


class Call(NamedTuple):
    operator: str
    tensors: Sequence[Tensor | None]
    ints: Sequence[int] = ()
    floats: Sequence[float] = ()


def run(library: Library, *calls: Call, threads: int = 1) -> None:
    """Runs the calls, in order, on the tensors where they are. `make sanitize` has more threads run them."""
    threads = int(os.environ.get("FURIOSA_TEST_THREADS", threads))
    tensors = list({id(tensor): tensor for call in calls for tensor in call.tensors if tensor is not None}.values())
    places = {id(tensor): index for index, tensor in enumerate(tensors)}
    code: list[int] = []
    for call in calls:
        operands = [-1 if tensor is None else places[id(tensor)] for tensor in call.tensors]
        bits = [struct.unpack("<q", struct.pack("<d", number))[0] for number in call.floats]
        code += [OPERATORS[call.operator].number]
        for numbers in (operands, call.ints, bits):
            code += [len(numbers), *numbers]
    numbers = [number for index, tensor in enumerate(tensors) for number in encode(index, tensor)]
    program = library.program(numbers, code, len(tensors), 0)
    program.run(library.pool(threads), [tensor.data_ptr() for tensor in tensors])


def lay_out_cache(cache: Tensor, part: str) -> Tensor:
    """A cache [slots, heads, size] as csrc/kv_cache.h lays it out, in a tensor of the same shape; whole groups only."""
    slots, heads, size = cache.shape
    numbers = 4 // cache.itemsize
    if part == "keys":
        words = cache.reshape(-1, 16, heads, size // numbers, numbers).permute(0, 2, 3, 1, 4)
    else:
        words = cache.reshape(-1, 16 // numbers, numbers, heads, size).permute(0, 3, 1, 4, 2)
    return words.reshape(slots, heads, size)


def read_cache(laid_out: Tensor, part: str) -> Tensor:
    """The inverse of `lay_out_cache`."""
    places = torch.arange(laid_out.numel()).reshape(laid_out.shape)
    numbers = 4 // laid_out.itemsize
    slots, heads, size = laid_out.shape
    if part == "keys":
        words = places.reshape(-1, heads, size // numbers, 16, numbers).permute(0, 3, 1, 2, 4)
    else:
        words = places.reshape(-1, heads, 16 // numbers, size, numbers).permute(0, 2, 4, 1, 3)
    return laid_out.reshape(-1)[words.reshape(slots, heads, size)]


CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""The dtypes of caches of codes."""


def encode_rows(rows: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The codes (uint8: a sign, and a magnitude of 7 bits) of float32 rows [..., size], and the scales [...]."""
    scales = rows.abs().amax(-1) / (127 if kind == "int8" else 448)
    steps = rows / torch.where(scales == 0, 1, scales)[..., None]
    if kind == "fp8":
        return steps.to(torch.float8_e4m3fn).view(torch.uint8), scales
    return (steps.round().abs().to(torch.uint8) | (steps.round() < 0).to(torch.uint8) << 7), scales


def decode_rows(codes: Tensor, scales: Tensor, kind: str) -> Tensor:
    """What codes stand for, in float64."""
    if kind == "fp8":
        return codes.view(torch.float8_e4m3fn).double() * scales.double()[..., None]
    return torch.where(codes >= 128, -1.0, 1.0).double() * (codes % 128) * scales.double()[..., None]


def lay_out_codes(codes: Tensor, scales: Tensor, part: str, kind: str) -> Tensor:
    """A cache of codes [slots, heads, size] with their scales [slots, heads], as the library has it."""
    slots, heads, size = codes.shape
    words = lay_out_cache(codes, part).reshape(slots // 16, heads, 16 * size)
    behind = scales.reshape(-1, 16, heads).transpose(1, 2).contiguous().view(torch.uint8)
    return torch.cat([words, behind], dim=-1).reshape(slots, heads, size + 4).view(CODES[kind])


def read_codes(cache: Tensor, part: str) -> tuple[Tensor, Tensor]:
    """The inverse of `lay_out_codes`."""
    slots, heads, row = cache.shape
    groups = cache.view(torch.uint8).reshape(slots // 16, heads, 16 * row)
    words, behind = groups[..., : 16 * (row - 4)], groups[..., 16 * (row - 4) :]
    scales = behind.contiguous().view(torch.float32).transpose(1, 2).reshape(slots, heads)
    return read_cache(words.reshape(slots, heads, row - 4), part), scales


def encode(buffer: int, tensor: Tensor, offset: int = 0) -> list[int]:
    """A tensor of a program that lies `offset` bytes behind the beginning of a buffer."""
    padding = [0] * (MOST_DIMENSIONS - tensor.dim())
    return [buffer, offset, DTYPES[tensor.dtype], tensor.dim(), *tensor.shape, *padding, *tensor.stride(), *padding]
