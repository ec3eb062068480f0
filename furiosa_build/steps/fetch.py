"""fetch: the source of the model, as two lists. Its files stay where they are: a directory or the hub's cache.

The weights may come from another directory: a quantized checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.canonical import canonical_json
from furiosa_build.checkpoint import (
    INDEX_FILE,
    MODEL_FILES,
    WEIGHT_PATTERNS,
    check_file,
    check_weight_file,
    read_json,
    weight_files,
)
from furiosa_build.errors import UserError
from furiosa_build.plan.outline import ParameterOutline
from furiosa_build.progress import current
from furiosa_build.recipe.schema import ModelSpec, QuantizationSpec
from furiosa_build.steps import source
from furiosa_build.steps.source import ModelFiles, Source, SourceFile

if TYPE_CHECKING:
    from tqdm.auto import tqdm

PARAM_FILE = "model.safetensors"
"""What `param_file_path` is listed as, whatever it is called: weights are the same under another name."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_model(model: ModelSpec, roots: Sequence[Path]) -> bool:
    """Whether `model_id_or_path` is a hub id: no directory of that name is there, and it reads like one."""
    return local_directory(model, roots) is None and _HUB_ID.fullmatch(model.model_id_or_path) is not None


def local_directory(model: ModelSpec, roots: Sequence[Path]) -> Path | None:
    """The directory that `model_id_or_path` names; a relative path is looked up in each of `roots`."""
    return next((path for path in _candidates(model.model_id_or_path, roots) if path.is_dir()), None)


def param_file(model: ModelSpec, roots: Sequence[Path]) -> Path | None:
    """The file that `param_file_path` names, if it is given; looked up like a directory. Raises UserError."""
    if model.param_file_path is None:
        return None
    for path in _candidates(model.param_file_path, roots):
        if path.is_file():
            return path
    raise UserError(
        f"parameter file {model.param_file_path!r} does not exist, or is no file",
        where="model.param_file_path",
        valid="a safetensors file that holds all parameters of the model, by their names in its state dict",
    )


def _candidates(path: str, roots: Sequence[Path]) -> list[Path]:
    expanded = Path(path).expanduser()
    return [expanded] if expanded.is_absolute() else [root / expanded for root in roots]


def checkpoint_directory(spec: QuantizationSpec, roots: Sequence[Path]) -> Path | None:
    """The directory that `quantize_artifact_path` names, if that is given. Raises UserError when there is none."""
    path = spec.quantize_artifact_path
    if path is None:
        return None
    for candidate in _candidates(path, roots):
        if candidate.is_dir():
            return candidate
    raise UserError(
        f"quantized checkpoint {path!r} does not exist",
        where="quantization.quantize_artifact_path",
        valid="a directory with a compressed-tensors checkpoint (also relative to the recipe's root)",
    )


def locate(model: ModelSpec, roots: Sequence[Path], revision: str | None, weights: bool = True) -> Path:
    """Where the files are on this machine: the directory, or the hub's cache for commit `revision`.

    Without `weights` they are not fetched. Raises UserError when there is neither.
    """
    directory = local_directory(model, roots)
    if directory is not None:
        return directory
    if not is_hub_model(model, roots):
        raise UserError(
            f"model directory {model.model_id_or_path!r} does not exist",
            where="model.model_id_or_path",
            valid="a directory in Hugging Face layout (also relative to the recipe's root), or a hub id: org/name",
        )
    return _download(model, revision, (*WEIGHT_PATTERNS, *MODEL_FILES) if weights else MODEL_FILES)


def read_config(model: ModelSpec, roots: Sequence[Path], weights: bool = True) -> dict[str, Any]:
    """The fields of the model's config.json: the recipe's `architecture`, else from the directory or the hub.

    Without `weights`, because others are taken, these may be quantized.
    """
    config = read_json(locate_config(model, roots)) if model.architecture is None else dict(model.architecture)
    if not weights:
        config.pop("quantization_config", None)
    if "quantization_config" in config:
        raise UserError(
            f"the weights of {model.model_id_or_path} are quantized already",
            where="config.json, quantization_config",
            valid="weights in float32, bfloat16 or float16",
            hint="name the original model; recipes quantize it themselves (quantization=fp8), or take weights that are "
            "quantized already: quantization.quantize_artifact_path=DIRECTORY",
        )
    return config


def cut_config(config: Mapping[str, Any], model: ModelSpec) -> dict[str, Any]:
    """The config of the model's first `num_hidden_layers` layers, if that is given."""
    wanted, all_layers = model.num_hidden_layers, config["num_hidden_layers"]
    if wanted is None:
        return dict(config)
    cut = {
        key: value[:wanted] if isinstance(value, list) and len(value) == all_layers else value
        for key, value in config.items()
    }
    return {**cut, "num_hidden_layers": wanted}


def locate_config(model: ModelSpec, roots: Sequence[Path]) -> Path:
    """The model's config.json. Raises UserError when there is none."""
    directory = local_directory(model, roots)
    if directory is None and is_hub_model(model, roots):
        return _download(model, model.revision, ("config.json",)) / "config.json"
    path = locate(model, roots, model.revision) / "config.json"
    if not path.is_file():
        raise UserError(
            "the model's directory has no config.json",
            where=str(path.parent),
            hint="is it in Hugging Face layout?",
        )
    return path


def hub_cache(model: ModelSpec) -> Path:
    """Where the hub's cache on this machine keeps the model, if it does."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{model.model_id_or_path.replace('/', '--')}"


def resolve_commit(model: ModelSpec) -> str | None:
    """The commit that a hub model's revision stands for, if that is known without asking the hub."""
    revision = model.revision or "main"
    if _COMMIT.fullmatch(revision):
        return revision
    reference = hub_cache(model) / "refs" / revision
    return reference.read_text().strip() if reference.is_file() else None


def run(
    model: ModelSpec,
    roots: Sequence[Path],
    parameters: dict[str, ParameterOutline],
    hash_file: Callable[[Path], str],
    output: Path,
    checkpoint: Path | None = None,
) -> None:
    """Writes weights.json and model_files.json.

    Args:
        model: Which model.
        roots: Where a relative path is looked up.
        parameters: What is drawn when weights are random.
        hash_file: sha256 of a file; may remember.
        output: Where to write.
        checkpoint: The directory that has the weights, if the model's own are not taken.
    """
    seed = model.seed_for_random_weight
    own = checkpoint is None and model.param_file_path is None
    directory = local_directory(model, roots) if seed is not None else locate(model, roots, None, weights=own)
    described = {} if directory is None else _describe(directory, MODEL_FILES, hash_file)
    config = described.pop("config.json", None)
    if directory is not None and config is not None:
        _check_config(model, directory / "config.json")
    if seed is not None:
        weights = Source(seed=seed, parameters=parameters)
    elif (file := param_file(model, roots)) is not None:
        check_weight_file(file)
        weights = Source(files={PARAM_FILE: SourceFile(size=file.stat().st_size, sha256=hash_file(file))})
    else:
        assert directory is not None
        weights = Source(files=_describe(checkpoint or directory, source_files(checkpoint or directory), hash_file))
    revision = directory.name if directory is not None and is_hub_model(model, roots) else None
    others = ModelFiles(files=described, revision=revision)
    (output / source.WEIGHTS).write_bytes(canonical_json(weights.model_dump(mode="json")))
    (output / source.MODEL_FILES).write_bytes(canonical_json(others.model_dump(mode="json")))


def source_files(directory: Path) -> list[str]:
    """Names of what `weights.json` lists of a directory. Raises UserError when a weight file is missing."""
    return [*weight_files(directory), *([INDEX_FILE] if (directory / INDEX_FILE).is_file() else [])]


def _check_config(model: ModelSpec, path: Path) -> None:
    """A recipe's architecture must be that of the weights."""
    found = read_json(path)
    for key in ("model_type", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        expected = (model.architecture or {}).get(key)
        if expected is not None and key in found and found[key] != expected:
            raise UserError(
                f"config.json says {key}={found[key]!r}, the recipe's architecture says {expected!r}",
                where=f"{path}, model.architecture.{key}",
                hint="name the weights that the recipe describes, or set model.architecture=null",
            )


def _describe(directory: Path, names: Sequence[str], hash_file: Callable[[Path], str]) -> dict[str, SourceFile]:
    files = [directory / name for name in names if (directory / name).is_file()]
    for file in files:
        if file.name in (*MODEL_FILES, INDEX_FILE):
            check_file(file)
        else:
            check_weight_file(file)
    return {file.name: SourceFile(size=file.stat().st_size, sha256=hash_file(file)) for file in files}


def _download(model: ModelSpec, revision: str | None, patterns: Sequence[str]) -> Path:
    """Takes what is in the hub's cache, and fetches what is not. The result's name is the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model.model_id_or_path,
                revision=revision or model.revision or "main",
                allow_patterns=list(patterns),
                tqdm_class=_download_meter(),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        token = "set" if os.environ.get("HF_TOKEN") else "not set"
        raise UserError(
            f"model {model.model_id_or_path!r} (revision {revision or model.revision or 'main'}) could not be fetched: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            where="model.model_id_or_path",
            hint=f"is the network there, and does HF_TOKEN ({token}) give access? A local copy works as well: "
            "model.model_id_or_path=DIRECTORY. For random weights: model.seed_for_random_weight=0",
        ) from error


def _download_meter() -> type[tqdm[Any]]:
    """What the hub's library tells of its progress, which it would draw itself, goes to this step's meter."""
    from tqdm.auto import tqdm

    meter = current()

    class DownloadMeter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts = kwargs.get("unit") == "B" and not kwargs.get("desc", "").startswith("Downloading")
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self.counts and meter is not None:
                self.n += int(n or 0)
                meter.note(int(self.n), int(self.total or 0))

    return DownloadMeter
