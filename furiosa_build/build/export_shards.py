"""`furiosa-build shard`: the parameter files of every rank of every stage, and one of metadata; no programs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.artifact.schema import to_json
from furiosa_build.artifact.writer import check_is_directory
from furiosa_build.core.canonical_json import digest
from furiosa_build.core.errors import UserError
from furiosa_build.core.files import link_or_copy, sync
from furiosa_build.core.safetensors_header import read_header
from furiosa_build.core.text import short_path, size_text
from furiosa_build.ir.outline import ParameterOutline
from furiosa_build.plan.model import ModelPlan
from furiosa_build.weights.listing import WEIGHTS

if TYPE_CHECKING:
    from furiosa_build.build.build import Build

SCHEMA_VERSION = 1
METADATA_FILE = "metadata.json"
STEP = "partition:weights"
_SUFFIXES = ("_packed", "_scale", "_shape")
"""Endings of the names of the tensors that a quantized weight is stored as."""


def check_output(directory: Path) -> None:
    """Raises UserError when `directory` is there and holds something else than shards. For before the work."""
    check_is_directory(directory, "--output")
    if directory.exists() and any(directory.iterdir()) and not (directory / METADATA_FILE).is_file():
        raise _other_content(directory, sorted(path.name for path in directory.iterdir())[0])


def write_shards(build: Build, directory: Path) -> str:
    """Makes `directory`, by one rename; returns what a person should know. Step `partition:weights` is done.

    Raises UserError when the directory holds anything else than what it would hold then.
    """
    outputs = build.run(STEP).record.outputs
    files = {name: build.store.path(output) for name, output in outputs.items()}
    source = build.store.read_json(build.run("fetch").record, WEIGHTS)
    described = {name: {"size": output.size, "sha256": output.sha256} for name, output in outputs.items()}
    metadata = to_json(
        describe(build.plan.model, described, {n: read_header(p) for n, p in files.items()}, digest(source))
    )
    size = size_text(sum(output.size for output in outputs.values()))
    shown = f"{short_path(directory)} ({len(files)} files, {size}, and {METADATA_FILE})"
    if directory.exists() and any(directory.iterdir()):
        _check_same(build, directory, {name: output.sha256 for name, output in outputs.items()}, metadata)
        return f"shards     {shown}: there already"
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for name, file in files.items():
            link_or_copy(file, staging / name)
        (staging / METADATA_FILE).write_bytes(metadata)
        staging.chmod(0o755)
        for path in (staging / METADATA_FILE, staging):
            sync(path)
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync(directory.parent)
    return f"shards     {shown}"


def describe(
    model: ModelPlan,
    files: Mapping[str, Mapping[str, Any]],
    headers: Mapping[str, Mapping[str, Any]],
    weights_digest: str,
) -> dict[str, Any]:
    """What the files hold: docs/output.md says it field by field.

    Args:
        model: The model.
        files: Size and sha256 of each parameter file.
        headers: What each says of its tensors.
        weights_digest: Of the source, as in the artifact.
    """
    schemes, parallel = model.schemes, model.spec.parallel
    stored: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for file, header in headers.items():
        for tensor, entry in header.items():
            parameter = _parameter_of(tensor, model.outline.parameters)
            here = stored.setdefault(_place_of(file), {}).setdefault(parameter, {})
            here[tensor] = {"file": file, "dtype": entry["dtype"], "shape": entry["shape"]}
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "pretrained_id": model.pretrained_id,
            "architecture": model.outline.architecture,
            "dtype": model.outline.dtype,
            "quantization": model.quantization,
            "weights_digest": weights_digest,
        },
        "hf_config": dict(model.hf_config),
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "stages": model.stages,
        "files": {name: {"stage": _place_of(name)[0], "rank": _place_of(name)[1], **f} for name, f in files.items()},
        "parameters": {
            name: {
                "dtype": parameter.dtype,
                "shape": parameter.shape,
                "quantization": schemes.get(name, "none"),
                "cut": _cut(parameter, parallel.tensor_parallel_size),
                "shards": [
                    {
                        "stage": stage,
                        "rank": rank,
                        **_share(parameter, parallel.tensor_parallel_size, rank),
                        "tensors": t,
                    }
                    for (stage, rank), t in _holders(stored, name)
                ],
            }
            for name, parameter in model.outline.parameters.items()
        },
    }


def _holders(
    stored: Mapping[tuple[int, int], Mapping[str, dict[str, Any]]], parameter: str
) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """The ranks that have a parameter, and the tensors it is stored as there. A tied one may be in two stages."""
    return ((where, held[parameter]) for where, held in sorted(stored.items()) if parameter in held)


def _cut(parameter: ParameterOutline, ranks: int) -> dict[str, Any] | None:
    """None: every rank has all of it."""
    cut = parameter.cut
    if cut is None or ranks == 1 or (cut.how != "once" and cut.local_shape(parameter.shape, ranks) == parameter.shape):
        return None
    return {"how": cut.how} if cut.how == "once" else {"how": cut.how, "dim": cut.dim}


def _share(parameter: ParameterOutline, ranks: int, rank: int) -> dict[str, int]:
    described = _cut(parameter, ranks)
    if described is None or "dim" not in described:
        return {}
    assert parameter.cut is not None
    begin, length = parameter.cut.share(parameter.shape, ranks, rank)
    return {"begin": begin, "length": length}


def _parameter_of(tensor: str, parameters: Mapping[str, ParameterOutline]) -> str:
    if tensor in parameters:
        return tensor
    return next(tensor.removesuffix(s) for s in _SUFFIXES if tensor.removesuffix(s) in parameters)


def _place_of(file: str) -> tuple[int, int]:
    """Stage and rank, from `stage-S-rank-R-...`."""
    _, stage, _, rank, *_ = file.split("-")
    return int(stage), int(rank)


def _check_same(build: Build, directory: Path, digests: Mapping[str, str], metadata: bytes) -> None:
    for path in sorted(directory.iterdir()):
        if path.name == METADATA_FILE and path.read_bytes() == metadata:
            continue
        if not path.is_file() or digests.get(path.name) != build.store.link_hashes.hash(path):
            raise _other_content(directory, path.name)
    for name in digests:
        if not (directory / name).exists():
            raise _other_content(directory, f"no {name}")


def _other_content(directory: Path, found: str) -> UserError:
    return UserError(
        f"the output directory {directory} exists and holds something else: {found}",
        where="--output",
        valid="a directory that is not there or empty, or that holds these very shards",
        hint="choose another directory, or move what is there",
    )
