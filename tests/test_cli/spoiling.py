"""What can be wrong with a user's files: functions that spoil a directory in which models have been built."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from safetensors.torch import load_file, save_file
from user_directory import UserDirectory

from furiosa_build.artifact.schema import (
    ARTIFACT_FILE,
    MANIFEST_FILE,
    TIMESTAMP_FILE,
    Artifact,
    Manifest,
    Timestamp,
    artifact_id,
    to_json,
)
from furiosa_build.steps.artifact_description import file_record

Spoil = Callable[[UserDirectory], object]
MODEL, SAVED = "tiny", "artifacts/tiny/latest"


def write(path: str, content: str | bytes, instead_of: str | None = None) -> Spoil:
    def spoil(user: UserDirectory) -> None:
        if instead_of is not None:
            (user.root / instead_of).unlink()
        (user.root / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def remove(path: str) -> Spoil:
    return lambda user: (user.root / path).unlink()


def truncate(path: str, size: int) -> Spoil:
    """To `size` bytes, or by as many if it is negative."""

    def spoil(user: UserDirectory) -> None:
        content = (user.root / path).read_bytes()
        (user.root / path).write_bytes(content[:size])

    return spoil


def flip_last_bit(path: str) -> Spoil:
    def spoil(user: UserDirectory) -> None:
        *content, last = (user.root / path).read_bytes()
        (user.root / path).write_bytes(bytes([*content, last ^ 1]))

    return spoil


def tensors(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Changes the model's weights in place."""

    def spoil(user: UserDirectory) -> None:
        file = user.root / MODEL / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return spoil


def config(drop: tuple[str, ...] = (), **fields: Any) -> Spoil:
    """Lays fields over the model's config.json, which loses others."""

    def spoil(user: UserDirectory) -> None:
        file = user.root / MODEL / "config.json"
        kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
        file.write_text(json.dumps({**kept, **fields}))

    return spoil


def index(*files: str) -> Spoil:
    """An index whose weights lie in these files, the model's own being the first of two."""

    def spoil(user: UserDirectory) -> None:
        directory = user.root / MODEL
        (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
        weights = {f"tensor{number}": file for number, file in enumerate(files)}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))

    return spoil


def move_away(path: str) -> Spoil:
    return lambda user: (user.root / path).rename(user.root / "moved-away")


def occupy(path: str, text: str = "somebody's own") -> Spoil:
    """Puts a file where an artifact is to go."""

    def spoil(user: UserDirectory) -> None:
        (user.root / path).parent.mkdir(parents=True, exist_ok=True)
        (user.root / path).write_text(text)

    return spoil


def artifact(**changes: Any) -> Spoil:
    """Makes the artifact another one, whole and with sound digests. A key such as `target__isa` leads inwards."""

    def spoil(user: UserDirectory) -> None:
        directory = user.root / SAVED
        data = json.loads((directory / ARTIFACT_FILE).read_text())
        for key, value in changes.items():
            *path, last = key.split("__")
            part = data
            for name in path:
                part = part[name]
            part[last] = value
        manifest = Manifest.model_validate_json((directory / MANIFEST_FILE).read_bytes())
        identity = manifest.artifact_id
        if "schema_version" not in changes:
            identity = data["metadata"]["artifact_id"] = artifact_id(Artifact.model_validate(data), manifest.files)
        files = {**manifest.files, ARTIFACT_FILE: file_record(to_json(data))}
        (directory / MANIFEST_FILE).write_bytes(to_json(Manifest(artifact_id=identity, files=files)))
        (directory / TIMESTAMP_FILE).write_bytes(to_json(Timestamp.of(identity, 1)))
        (directory / ARTIFACT_FILE).write_bytes(to_json(data))

    return spoil
