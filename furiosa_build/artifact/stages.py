"""Which stage runs which supertask, and what is sent from one to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from furiosa_build.artifact.schema import Artifact, ParameterFiles, Pipeline, Supertask
from furiosa_build.core.errors import UserError
from furiosa_build.ir.stages import split_layers


def with_sends(tasks: Sequence[Supertask]) -> Iterator[Supertask]:
    """`tasks`, with a `send` at the end of each stage of the tensors that were written so far and are read later."""
    written: set[str] = set()
    for number, task in enumerate(tasks):
        if number and task.stage != tasks[number - 1].stage:
            passed = sorted(written & _read_before_written(tasks[number:]))
            yield Supertask(
                kind="comm",
                op="send",
                stage=task.stage - 1,
                ranks=task.ranks,
                inputs={name: name for name in passed},
                outputs=passed,
            )
            written = set(passed)
        yield task
        written.update(task.outputs)


def _read_before_written(tasks: Sequence[Supertask]) -> set[str]:
    read: set[str] = set()
    written: set[str] = set()
    for task in tasks:
        read.update(set(task.inputs.values()) - written)
        written.update(task.outputs)
    return read


def restage(artifact: Artifact, stages: int) -> Artifact:
    """The artifact divided into `stages` pipeline stages instead. Its files stay as they are.

    Raises:
        UserError: There are fewer layers than stages, or a program has layers of two stages.
    """
    if stages == artifact.parallel_config.pipeline_parallel_size:
        return artifact
    layers = artifact.model_metadata.num_hidden_layers
    if not 1 <= stages <= layers:
        raise UserError(
            f"pipeline_parallel_size={stages}: the model has {layers} layers",
            where="pipeline_parallel_size",
            valid=f"1 to {layers}",
        )
    stage_of = {layer: stage for stage, part in enumerate(split_layers(layers, stages)) for layer in part}
    parallel = artifact.parallel_config.model_copy(update={"pipeline_parallel_size": stages})
    ranks = range(parallel.tensor_parallel_size)
    return artifact.model_copy(
        update={
            "parallel_config": parallel,
            "pipelines": [_restage(pipeline, stage_of) for pipeline in artifact.pipelines],
            # A stage finds its parameters among those of all stages: files are mapped, not read.
            "parameters": [
                ParameterFiles(stage=stage, rank=rank, files=_files(artifact, rank))
                for stage in range(stages)
                for rank in ranks
            ],
            "kv_cache": [spec.model_copy(update={"stage": stage_of[spec.layer]}) for spec in artifact.kv_cache],
        }
    )


def _restage(pipeline: Pipeline, stage_of: dict[int, int]) -> Pipeline:
    tasks: list[Supertask] = []
    last = max(stage_of.values())
    stage = 0
    for task in pipeline.supertasks:
        if task.op == "send":
            continue
        wanted = {stage_of[layer] for layer in task.layers}
        if len(wanted) > 1:
            raise UserError(
                f"program {task.program!r} has layers {task.layers[0]} to {task.layers[-1]}, which {last + 1} stages "
                f"would divide",
                where="pipeline_parallel_size",
                hint="build the artifact with that pipeline_parallel_size, or with use_blockwise_compile and "
                "a num_blocks_per_supertask that fits",
            )
        # Tasks without a layer (collectives, and what follows the last layer) belong to the stage before them.
        stage = max(stage, *wanted) if wanted else stage
        tasks.append(task.model_copy(update={"stage": stage}))
    return pipeline.model_copy(update={"supertasks": list(with_sends(tasks))})


def _files(artifact: Artifact, rank: int) -> list[str]:
    return sorted({file for group in artifact.parameters if group.rank == rank for file in group.files})
