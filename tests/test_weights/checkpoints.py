"""Checkpoints as the world stores them: each a change of a small model's directory that transformers wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
Tensors = dict[str, Tensor]


def change_tensors(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Writes other tensors into the weights' one file."""
    save_file(change(load_file(directory / WEIGHTS)), directory / WEIGHTS, metadata={"format": "pt"})


def rename(directory: Path, name_of: Callable[[str], str]) -> None:
    """Stores the same tensors under other names."""
    change_tensors(directory, lambda tensors: {name_of(name): tensor for name, tensor in tensors.items()})


def change_config(directory: Path, drop: tuple[str, ...] = (), **fields: Any) -> None:
    """Changes fields of config.json."""
    path = directory / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps({**config, **fields}))


def write_shards(directory: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Stores tensors in two files with an index."""
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        members = {name: tensors[name] for name in names if files[name] == file}
        save_file(members, directory / file, metadata={"format": "pt"})
    index = {"metadata": dict(metadata or {}), "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def other_head(tensors: Tensors) -> Tensors:
    """A head that is not the embedding."""
    head = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(1))
    return {**tensors, "lm_head.weight": 0.1 * head}


def same_head(tensors: Tensors) -> Tensors:
    """The embedding once more, under the head's name."""
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def only_the_head(tensors: Tensors) -> Tensors:
    """The embedding under the head's name alone."""
    embedding = tensors.pop("model.embed_tokens.weight")
    return {**tensors, "lm_head.weight": embedding}
