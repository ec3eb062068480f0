"""Memory, disk and time of a build, by step: `python benchmarks/build_memory.py [1b|8b] [int8|fp8|none]`.

Makes a checkpoint with random weights in the shape of Llama-3.2-1B (2.5 GB) or Llama-3.1-8B (16 GB, one file at a time)
and builds it, in one bucket of each phase. Everything is made in a temporary directory (`--directory`: where) and
removed: 8b takes up to 35 GB.

Ends with exit status 1 when a promise is broken: private memory of the steps that handle weights at most 0.5 (1b) or
0.25 (8b) of the model's size; disk at most the checkpoint and 1.1 times the artifact. Times are reported, not judged.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from furiosa_build.build.build import open_build
from furiosa_build.core.peak_memory import Watch

COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "1b": {
        **COMMON,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": {
        **COMMON,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
MOST_MEMORY = {"1b": 0.5, "8b": 0.25}
"""Of the model's size, private, at the peak."""
BOUNDED = ("fetch", "quantize", "partition:weights", "package", "qualify")
MOST_DISK = 1.1
"""Of the artifact's size, besides the checkpoint."""

RECIPE = """\
defaults: [base, buckets: small, quantization: {scheme}]
model: {{model_id_or_path: checkpoint}}
buckets: {{prefill_buckets: [[1, 32]], decode_buckets: [[4, 64]], max_seq_len_to_capture: 64}}
"""


class Row(NamedTuple):
    """What one step took: seconds, bytes."""

    step: str
    seconds: float
    private: int
    mapped: int


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("size", nargs="?", choices=CONFIGS, default="1b")
    parser.add_argument("scheme", nargs="?", choices=("int8", "fp8", "none"), default="int8")
    parser.add_argument("--directory", type=Path, help="where to make everything (default: the system's temporary)")
    given = parser.parse_args()
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    with tempfile.TemporaryDirectory(dir=given.directory, prefix="build-memory-") as work:
        return measure(Path(work), given.size, given.scheme)


def measure(work: Path, size: str, scheme: str) -> int:
    checkpoint = work / "checkpoint"
    apart(make_checkpoint, CONFIGS[size], checkpoint)
    model = disk_use(checkpoint)
    print(f"Llama {size} to {scheme}: a checkpoint of {gb(model)}")
    os.sync()
    copying = seconds(lambda: copy(checkpoint, work / "copy"))
    shutil.rmtree(work / "copy")

    (work / "recipes").mkdir()
    (work / "recipes" / "measured.yaml").write_text(RECIPE.format(scheme=scheme))
    disk, weights, broken = 0, 0.0, []
    print(f"{'step':28} {'seconds':>8} {'private':>9} {'of model':>9} {'mapped':>9}")
    for row in build(work):
        share, verdict = row.private / model, ""
        if row.step in BOUNDED:
            verdict = f"at most {MOST_MEMORY[size]}"
            if share > MOST_MEMORY[size]:
                verdict += ": BROKEN"
                broken.append(row.step)
        print(f"{row.step:28} {row.seconds:8.1f} {gb(row.private):>9} {share:9.3f} {gb(row.mapped):>9}  {verdict}")
        if row.step in ("quantize", "partition:weights"):
            weights += row.seconds
        disk = max(disk, disk_use(work))

    print(f"quantize + partition:weights: {weights:.1f} s; `cp` of the checkpoint's files: {copying:.1f} s")
    artifact = disk_use(*(work / "artifacts" / "measured").glob("[0-9a-f]*/"))
    allowed = model + MOST_DISK * artifact
    print(f"disk: {gb(disk)}; checkpoint + {MOST_DISK} x artifact ({gb(artifact)}): {gb(allowed)}")
    if disk > allowed:
        broken.append("disk")
    if broken:
        print(f"promises broken: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


def build(work: Path) -> Iterator[Row]:
    """Runs every step by itself."""
    steps = open_build("measured", [f"cache_dir='{work / 'store'}'"], work)
    try:
        for name in steps.plan.steps:
            with Watch() as here:  # the build's own process, which also hashes what is fetched and published
                took = seconds(lambda: steps.run(name))  # noqa: B023
            record = steps.outcomes[name].record
            if here.peak is None or record.peak_memory is None or record.peak_mapped is None:
                sys.exit("this system does not tell private memory from mapped files")
            private, mapped = max(here.peak.private, record.peak_memory), max(here.peak.mapped, record.peak_mapped)
            yield Row(name, took, private, mapped)
    finally:
        steps.close()


def make_checkpoint(config: dict[str, Any], directory: Path) -> None:
    """Writes a checkpoint in Hugging Face layout, one tensor in memory at a time."""
    from furiosa_build.models.analyze import survey
    from furiosa_build.weights.random import RandomSource
    from furiosa_build.weights.safetensors_writer import SafetensorsWriter, file_names, split_into_files

    parameters = survey(config).parameters
    source = RandomSource(parameters, seed=0)
    files = split_into_files(({name: source.layout(name)} for name in parameters), 5 << 30)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    index = {}
    for file, layouts in zip(file_names(len(files)), files, strict=True):
        index.update(dict.fromkeys(layouts, file))
        with SafetensorsWriter(directory / file, layouts) as writer:
            for name in writer.order:
                writer.write(name, source.read(name))
    if len(files) > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def apart(function: Callable[..., None], *arguments: Any) -> None:
    """Calls in another process: this one, in which fetch and package run, stays without torch, as a build's is."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        sys.exit("the checkpoint could not be made")


def copy(source: Path, target: Path) -> None:
    """`cp -r`, on disk when it returns, as the outputs of a step are."""
    shutil.copytree(source, target)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def seconds(work: Callable[[], object]) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def disk_use(*directories: Path) -> int:
    """Bytes on disk below `directories`; a file of several names counts once."""
    found = {}
    for directory in directories:
        for path in directory.rglob("*"):
            stat = path.lstat()
            found[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return sum(found.values())


def gb(size: int | float) -> str:
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
