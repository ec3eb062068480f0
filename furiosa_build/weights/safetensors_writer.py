"""Writes a safetensors file tensor by tensor: memory holds one tensor, the digest is known at the end.

Format: https://huggingface.co/docs/safetensors, 8 bytes of header length, JSON header, the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from furiosa_build.core.failpoints import reach
from furiosa_build.core.progress import advance
from furiosa_build.ir.tensors import Layout

_CODES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "int64": "I64",
}
_ALIGNMENT = 64
"""Bytes. The data begins at a multiple, tensors whose size is one come first: they are mapped straight into kernels."""


class SafetensorsWriter:
    """Use as a context manager; write every tensor of `layouts` once, in `order`. `sha256` is set at the end."""

    def __init__(self, path: Path, layouts: Mapping[str, Layout]) -> None:
        self.order = sorted(layouts, key=lambda name: (layouts[name].nbytes % _ALIGNMENT != 0, name))
        self.sha256 = ""
        self._layouts = layouts
        self._path = path
        self._pending = list(self.order)
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)  # hashing takes about as long as writing, and a core of its own

    def __enter__(self) -> SafetensorsWriter:
        self._file = self._path.open("wb")
        self._put(_header(self._layouts, self.order))
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError when it is not this tensor's turn, or it is not as laid out."""
        if not self._pending or self._pending[0] != name:
            raise ValueError(f"{name} is not the next tensor to be written")
        if (found := Layout.of(tensor)) != self._layouts[name]:
            raise ValueError(f"{name} is {found}, laid out as {self._layouts[name]}")
        self._pending.pop(0)
        reach("mid-write")
        self._put(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        advance(tensor.nbytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._hasher.shutdown()
        if kind is None:
            if self._pending:
                raise ValueError(f"{len(self._pending)} tensors were not written: {self._pending[0]}, ...")
            self.sha256 = self._hash.hexdigest()

    def _put(self, data: bytes | memoryview) -> None:
        hashing = self._hasher.submit(self._hash.update, data)
        self._file.write(data)
        hashing.result()


def split_into_files(groups: Iterable[Mapping[str, Layout]], largest: int) -> list[dict[str, Layout]]:
    """Spreads tensors, in order, over files of at most `largest` bytes. A group stays together, whatever its size."""
    files: list[dict[str, Layout]] = []
    size = 0
    for group in groups:
        nbytes = sum(layout.nbytes for layout in group.values())
        if not files or size + nbytes > largest:
            files.append({})
            size = 0
        files[-1].update(group)
        size += nbytes
    return files


def file_names(count: int) -> list[str]:
    """The names Hugging Face gives the files of a checkpoint."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _header(layouts: Mapping[str, Layout], order: Sequence[str]) -> bytes:
    entries, offset = {}, 0
    for name in order:
        layout = layouts[name]
        entries[name] = {
            "dtype": _CODES[layout.dtype],
            "shape": list(layout.shape),
            "data_offsets": [offset, offset + layout.nbytes],
        }
        offset += layout.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
