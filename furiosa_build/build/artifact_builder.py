"""`ArtifactBuilder`: builds an artifact from Python, with the arguments of Furiosa LLM's class of that name.

It is one more face of BuildSpec and Build: the same arguments give the same artifact as a recipe does.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

from furiosa_build.core.errors import UserError, nearest
from furiosa_build.core.events import Listener
from furiosa_build.recipe.compose import recipe_roots, validate
from furiosa_build.recipe.schema import Recipe, SchedulerConfig
from furiosa_build.recipe.schema.spec import joined_devices
from furiosa_build.recipe.targets import load_target, target_with
from furiosa_build.store import default_store_root

if TYPE_CHECKING:
    from furiosa_build.models.config_types import KvCacheSharingAcrossBeamsConfig

DEFAULT_CACHE = Path("~/.cache/furiosa/llm")

_EXTRA = ("backend", "quantization", "target", "speculative_recipe", "num_speculative_tokens")
_SCHEDULER = SchedulerConfig()


class ArtifactBuilder:
    """The artifact builder of the Furiosa LLM API.

    Args:
        model_id_or_path: A hub id, or a directory in Hugging Face layout.
        devices: Such as `cpu`, `npu:0`, `npu:0:*`, `npu:0:0-3`; several joined by commas, or as a list. The elements
            of an NPU are emulated on the host.
        name: Of the artifact; by default the last part of `model_id_or_path`.
        tensor_parallel_size: Ranks that share every layer.
        pipeline_parallel_size: Stages that the layers are divided among.
        data_parallel_size: Replicas; by default as many as the devices have elements for.
        prefill_buckets: (batch size, tokens of a prompt); by default one of (1, max_seq_len_to_capture).
        decode_buckets: (batch size, tokens of context); the same default.
        max_seq_len_to_capture: Longest sequence, in tokens; by default 2048, or as many as the model takes if that is
            less.
        num_hidden_layers: Only so many of the model's layers.
        seed_for_random_weight: Random weights drawn from this seed; nothing is downloaded but the config.
        calculate_logit_only_for_last_token: Prefill gives the logits of the last token only; by default if
            `add_prefill_last_block_slice`.
        quantize_artifact_path: A compressed-tensors checkpoint, whose weights are taken as they are.
        compiler_config_overrides: Options of the backend's compiler; unknown ones are refused with its list.
        do_decompositions_for_model_rewrite: Graphs call operators of core ATen only.
        use_blockwise_compile: Layers are compiled apart, and equal ones once. Else each stage is one program.
        num_blocks_per_supertask: Layers that run as one program.
        num_blocks_per_pp_stage: Layers of each stage; by default the same number.
        embed_all_constants_into_graph: Parameters are constants inside the programs, and no files of their own.
        add_prefill_last_block_slice: What follows attention in the last layer of prefill is computed for the last
            token only.
        kv_cache_sharing_across_beams_config: (beams of a search, most tokens that each generates); decode buckets then
            have a row for each beam.
        paged_attention_num_blocks: KV blocks of a layer; by default enough for the largest decode bucket, or what the
            target's memory has room for.
        paged_attention_block_size: Tokens of a KV block.
        default_scheduler_config: What the runtime starts with.
        kwargs: Beyond that API: `backend` (`native`), `quantization` (`none`, `fp8`, `int8`), `target` (a file of
            conf/target; by default `cpu`, or for an NPU the one that has such devices), `speculative_recipe` (the
            recipe of a draft model) and `num_speculative_tokens` (those that it proposes at a time).

    Attributes:
        listeners: Called with the events of a build (`furiosa_build.core.events`); none at first, so that a build
            prints nothing.

    Raises:
        UserError: An argument is unknown or not valid. Nothing has been written.
    """

    def __init__(
        self,
        model_id_or_path: str,
        devices: str | Sequence[str],
        name: str = "",
        *,
        tensor_parallel_size: int = 4,
        pipeline_parallel_size: int = 1,
        data_parallel_size: int | None = None,
        prefill_buckets: Sequence[tuple[int, int]] = (),
        decode_buckets: Sequence[tuple[int, int]] = (),
        max_seq_len_to_capture: int | None = None,
        num_hidden_layers: int | None = None,
        seed_for_random_weight: int | None = None,
        calculate_logit_only_for_last_token: bool | None = None,
        quantize_artifact_path: str | PathLike[str] | None = None,
        compiler_config_overrides: Mapping[str, Any] | None = None,
        do_decompositions_for_model_rewrite: bool = False,
        use_blockwise_compile: bool = True,
        num_blocks_per_supertask: int = 1,
        num_blocks_per_pp_stage: Sequence[int] | None = None,
        embed_all_constants_into_graph: bool = False,
        add_prefill_last_block_slice: bool = False,
        kv_cache_sharing_across_beams_config: KvCacheSharingAcrossBeamsConfig | None = None,
        paged_attention_num_blocks: int | None = None,
        paged_attention_block_size: int = 1,
        default_scheduler_config: SchedulerConfig = _SCHEDULER,
        **kwargs: Any,
    ) -> None:
        _refuse_unknown(kwargs, _EXTRA)
        self.listeners: list[Listener] = []
        beams = kv_cache_sharing_across_beams_config
        self._roots = recipe_roots()
        on = joined_devices(devices)
        target = kwargs.get("target") or target_with(on, self._roots, "ArtifactBuilder: devices") or "cpu"
        self._spec: dict[str, Any] = {
            "name": name or PurePath(model_id_or_path).name,
            "devices": on,
            "model": {
                "model_id_or_path": fspath(model_id_or_path),
                "num_hidden_layers": num_hidden_layers,
                "seed_for_random_weight": seed_for_random_weight,
                "calculate_logit_only_for_last_token": (
                    add_prefill_last_block_slice
                    if calculate_logit_only_for_last_token is None
                    else calculate_logit_only_for_last_token
                ),
            },
            "target": load_target(target, self._roots),
            "backend": {
                "name": kwargs.get("backend", "native"),
                "compiler_config_overrides": dict(compiler_config_overrides or {}),
            },
            "parallel": {
                "tensor_parallel_size": tensor_parallel_size,
                "pipeline_parallel_size": pipeline_parallel_size,
                "data_parallel_size": data_parallel_size,
                "num_blocks_per_pp_stage": None if num_blocks_per_pp_stage is None else list(num_blocks_per_pp_stage),
            },
            "buckets": {
                "prefill_buckets": sorted({tuple(bucket) for bucket in prefill_buckets}),
                "decode_buckets": sorted({tuple(bucket) for bucket in decode_buckets}),
                **({} if max_seq_len_to_capture is None else {"max_seq_len_to_capture": max_seq_len_to_capture}),
                "paged_attention_num_blocks": paged_attention_num_blocks,
                "paged_attention_block_size": paged_attention_block_size,
                "kv_cache_sharing_across_beams_config": None if beams is None else beams._asdict(),
            },
            "rewriting": {
                "use_blockwise_compile": use_blockwise_compile,
                "num_blocks_per_supertask": num_blocks_per_supertask,
                "do_decompositions_for_model_rewrite": do_decompositions_for_model_rewrite,
                "embed_all_constants_into_graph": embed_all_constants_into_graph,
                "add_prefill_last_block_slice": add_prefill_last_block_slice,
            },
            "quantization": {
                "scheme": kwargs.get("quantization", "none"),
                "quantize_artifact_path": None if quantize_artifact_path is None else fspath(quantize_artifact_path),
            },
            "scheduler": default_scheduler_config.model_dump(),
            "speculative": {
                "recipe": kwargs.get("speculative_recipe"),
                "num_speculative_tokens": kwargs.get("num_speculative_tokens"),
            },
        }
        validate("ArtifactBuilder", self._spec, {}, self._roots)

    def build(
        self,
        save_dir: str | PathLike[str],
        *,
        num_pipeline_builder_workers: int = 1,
        num_compile_workers: int = 1,
        cache_dir: str | PathLike[str] | None = DEFAULT_CACHE,
        param_file_path: str | PathLike[str] | None = None,
        param_saved_format: Literal["safetensors", "pt"] = "safetensors",
        _cleanup: bool = True,
        **kwargs: Any,
    ) -> None:
        """Builds what is not built yet; the artifact is in SAVE_DIR/NAME/VERSION, and `SAVE_DIR` opens as well.

        Args:
            save_dir: Where the artifact goes.
            num_pipeline_builder_workers: Graphs traced at a time.
            num_compile_workers: Programs compiled at a time.
            cache_dir: The store of finished steps; by default $FURIOSA_BUILD_CACHE where that is set. None: nothing is
                kept but the artifact.
            param_file_path: A safetensors file with all parameters; the model gives config and tokenizer only.
            param_saved_format: `safetensors`; `pt` would need unpickling, and is refused.
            _cleanup: Whether the files of a build without a `cache_dir` are removed at the end.

        Raises:
            BuildError: As the command line would say it: UserError, PreflightError, or StepError, which names a log.
            KeyboardInterrupt: On Ctrl-C, once the workers have ended. Finished steps are in the store.
        """
        _refuse_unknown(kwargs, ())
        if param_saved_format != "safetensors":
            raise UserError(
                f"param_saved_format={param_saved_format!r}: a pickle runs code when it is read",
                where="ArtifactBuilder.build",
                valid="safetensors",
            )
        with _store(cache_dir, Path(save_dir), _cleanup) as store:
            recipe = self.recipe(
                save_dir,
                cache_dir=store,
                num_pipeline_builder_workers=num_pipeline_builder_workers,
                num_compile_workers=num_compile_workers,
                param_file_path=param_file_path,
            )
            run(recipe, self.listeners)

    def recipe(
        self,
        save_dir: str | PathLike[str],
        *,
        cache_dir: str | PathLike[str],
        num_pipeline_builder_workers: int = 1,
        num_compile_workers: int = 1,
        param_file_path: str | PathLike[str] | None = None,
    ) -> Recipe:
        """The recipe that `build` builds, with its arguments. Raises UserError."""
        model = {**self._spec["model"], "param_file_path": None if param_file_path is None else fspath(param_file_path)}
        options = {
            "save_dir": str(save_dir),
            "cache_dir": fspath(cache_dir),
            "num_pipeline_builder_workers": num_pipeline_builder_workers,
            "num_compile_workers": num_compile_workers,
        }
        return validate("ArtifactBuilder.build", {**self._spec, "model": model}, options, self._roots)


def run(recipe: Recipe, listeners: Iterable[Listener] = ()) -> None:
    """Builds; raises the BuildError that the command line would print, KeyboardInterrupt when it is interrupted."""
    from furiosa_build.build import graph
    from furiosa_build.build.build import open_recipe

    build = open_recipe(recipe, listeners=listeners)
    try:
        graph.execute(build)
    finally:
        build.close()


def _refuse_unknown(given: Mapping[str, Any], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            every = [*_ARGUMENTS, *known]
            raise UserError(
                f"unknown argument {name}={given[name]!r}",
                where="ArtifactBuilder",
                valid=", ".join(every),
                hint=nearest(name, every),
            )


_ARGUMENTS = [
    *(ArtifactBuilder.__init__.__kwdefaults__ or {}),
    *(ArtifactBuilder.build.__kwdefaults__ or {}),
]


@contextmanager
def _store(cache_dir: str | PathLike[str] | None, save_dir: Path, cleanup: bool) -> Iterator[str]:
    """The store's directory. Without one, a temporary one where the artifact can share its files."""
    if cache_dir is DEFAULT_CACHE:
        yield fspath(default_store_root())
    elif cache_dir is not None:
        yield fspath(cache_dir)
    else:
        save_dir.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=".store-", dir=save_dir)
        try:
            yield temporary
        finally:
            if cleanup:
                shutil.rmtree(temporary, ignore_errors=True)
