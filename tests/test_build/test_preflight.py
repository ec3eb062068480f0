"""Before the work starts: figures that agree with what is built, and a build that is refused with nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import StartBuild
from test_models.tiny import LLAMA
from user_directory import (
    RANDOM,
    UserDirectory,
    furiosa_build,
    make_built_directory,
    make_user_directory,
    steps_in_this_process,
)

from furiosa_build.build.build import Build
from furiosa_build.build.executors.local import WorkerPool
from furiosa_build.core.errors import PreflightError
from furiosa_build.core.system import Machine
from furiosa_build.store import Store
from furiosa_build.ui.plan_text import plan_text

GB = 10**9
BIG = Machine(cores=2, memory=64 * GB, available=60 * GB)
WORKER = 300_000_000
"""See plan/needs.py. With backend eager every worker takes as much."""
FOR_TWO = Machine(cores=2, memory=64 * GB, available=4 * WORKER + 170_000_000)
"""One that traces and two that compile, while the artifact qualifies: one process runs it, another transformers."""


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """A directory in which the recipe has been built. Not to be changed."""
    return make_built_directory(tmp_path_factory.mktemp("preflight"))


@pytest.fixture
def fresh(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """A directory in which nothing has been built."""
    return make_user_directory(tmp_path / "user", tmp_path / "store", built.root / "tiny")


@pytest.fixture
def user(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """A directory in which the recipe has been built, to be changed."""
    shutil.copytree(built.store, tmp_path / "store")
    directory = make_user_directory(tmp_path / "user", tmp_path / "store", built.root / "tiny")
    assert directory.build() == []
    return directory


NO_TOKENIZER = "no tokenizer, tiny brings none: the artifact takes and gives token ids"


def begin(build: Build, machine: Machine = BIG) -> list[str]:
    try:
        return build.begin(build.plan.steps, machine)
    finally:
        build.close()


def machine(available: int) -> Machine:
    return Machine(cores=2, memory=64 * GB, available=available)


# The figures and what is built


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["none", "fp8", "int8"])
def test_parameters_take_as_many_bytes_as_was_said(start_build: StartBuild, scheme: str, dtype: str) -> None:
    """Rows of 90 are no whole number of int32: int8 fills them up."""
    build = start_build({**LLAMA, "dtype": dtype, "intermediate_size": 90}, scheme=scheme)
    figures = build.preflight(machine=BIG)
    said = figures.disks[0].parts["parameters"]
    for name in ("fetch", "quantize", "partition:weights"):
        build.run(name)
    files = [build.store.path(output) for output in build.outcomes["partition:weights"].record.outputs.values()]
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    total = sum(file.stat().st_size for file in files)
    assert figures.device.parts["parameters"] == total - headers
    assert total - headers < said < total + headers, "the size of the headers is a guess"


def test_all_that_a_build_writes_is_about_what_was_said(fresh: UserDirectory) -> None:
    figures = fresh.open().preflight(machine=BIG)
    fresh.build()
    (disk,) = figures.disks
    links: dict[int, os.stat_result] = {}
    for root in (fresh.store / "blobs", fresh.root / "artifacts"):
        links.update({path.stat().st_ino: path.stat() for path in root.rglob("*") if path.is_file()})
    written = sum(stat.st_size for stat in links.values())
    # A tiny model is mostly programs, of which the size is guessed, and rather too large.
    assert disk.parts["parameters"] < written < disk.needed


def test_kv_cache_is_that_of_the_artifact(built: UserDirectory) -> None:
    artifact, config = built.latest(), built.latest().generator_config
    slots = (config.paged_attention_num_blocks + 1) * config.paged_attention_block_size  # and a block for padding
    expected = sum(2 * slots * cache.shape_per_slot[0] * cache.shape_per_slot[1] * 4 for cache in artifact.kv_cache)
    assert built.open().preflight(machine=BIG).device.parts["KV cache"] == expected > 0


# A build that begins


def test_a_build_with_nothing_to_do_asks_nothing(built: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*arguments: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(Store, "records", asked)
    monkeypatch.setattr("furiosa_build.build.estimates.this_machine", asked)
    monkeypatch.setattr("furiosa_build.build.estimates.disk_of", asked)
    build = built.open()
    assert build.begin(build.plan.steps) == []
    build.close()


def test_a_build_that_fits_begins_with_what_it_says_of_any(fresh: UserDirectory) -> None:
    assert begin(fresh.open("num_compile_workers=4")) == [NO_TOKENIZER]


def test_fewer_compile_workers_than_asked_and_it_is_said(fresh: UserDirectory) -> None:
    build = fresh.open("num_compile_workers=4")
    assert begin(build, FOR_TWO) == [
        NO_TOKENIZER,
        "num_compile_workers: 4 asked for, the memory is for 2 (1.37 GB available, each takes 300 MB)",
    ]
    compilers = build.executors["compiler"]
    assert isinstance(compilers, WorkerPool)
    assert compilers.workers == 2


def test_without_memory_it_is_refused(fresh: UserDirectory) -> None:
    with pytest.raises(PreflightError) as refused:
        begin(fresh.open(), machine(1_000_000))
    text = str(refused.value)
    assert re.search(r"^  memory: [\d.]+ GB \(.* MB, .* MB\) needed, 1 MB there$", text, re.MULTILINE)
    assert "hint: " in text
    assert refused.value.exit_status == 4


def test_a_refused_build_writes_nothing(fresh: UserDirectory) -> None:
    furiosa_build(fresh, "plan", "tiny")  # surveys the model
    before = sorted(path for path in fresh.root.parent.rglob("*") if path.is_file())
    ran = furiosa_build(fresh, "build", "tiny", "target.memory_gb=0.00002")
    assert (ran.status, ran.out) == (4, "")
    assert re.fullmatch(
        r"error: the build cannot fit\n"
        r"  a device of target cpu: [\d.]+ kB \(parameters [\d.]+ kB, KV cache [\d.]+ kB\) needed, 20 kB there\n"
        r"    hint: quantization=fp8, or a device with more memory \(target.memory_gb\)\n",
        ran.err,
    )
    assert sorted(path for path in fresh.root.parent.rglob("*") if path.is_file()) == before


def test_what_a_target_has_is_no_part_of_the_artifact_unless_it_makes_the_kv_cache_smaller(user: UserDirectory) -> None:
    """Parameters of 78.5 kB, and 8 KV blocks of 4.1 kB, one more for padding, where there is room for them."""
    assert user.build("target.memory_gb=24.5") == []
    assert user.build("target.memory_gb=0.0001040", "buckets.paged_attention_num_blocks=null") == ["package", "qualify"]
    before = user.latest()
    assert before.generator_config.paged_attention_num_blocks == 5
    assert user.build("target.memory_gb=0.0001041") == [], "the same number"
    ran = furiosa_build(user, "build", "tiny", "target.memory_gb=0.000108")
    assert ran.status == 0
    said = r"^KV cache: 6 blocks of 16 tokens, derived from the memory of target cpu: \(108 kB of the device - .*: 6 "
    assert re.search(said, ran.out, re.MULTILINE)
    assert user.latest().metadata.artifact_id != before.metadata.artifact_id


def test_files_that_were_touched_may_be_the_same_so_nothing_is_refused(user: UserDirectory) -> None:
    """Until they are read nobody knows. The steps that depend on them show as to do."""
    os.utime(user.root / "tiny" / "model.safetensors", ns=(1, 1))
    build = user.open()
    figures = build.preflight(machine=machine(0))
    assert {"fetch", "quantize", "partition:weights", "package", "qualify"} <= set(figures.work)
    assert figures.memory.needed > 0
    assert begin(build, machine(0)) == [NO_TOKENIZER]
    assert user.build() == []


def test_what_was_never_built_is_refused_though_the_files_were_touched(user: UserDirectory) -> None:
    os.utime(user.root / "tiny" / "model.safetensors", ns=(1, 1))
    with pytest.raises(PreflightError, match="memory"):
        begin(user.open("quantization=int8"), machine(0))


def test_only_the_steps_that_are_asked_for_count(fresh: UserDirectory) -> None:
    build = fresh.open("target.memory_gb=0.00002")
    assert build.begin([name for name in build.plan.steps if not name.startswith(("package", "qualify"))], BIG) == []
    build.close()


# The plan


def needs(text: str) -> dict[str, str]:
    lines = text.split("\nneeds\n")[1].splitlines()
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines if re.match(r"  \w[\w ]*\w {2}", line))


def test_what_a_plan_shows(fresh: UserDirectory) -> None:
    text = plan_text(fresh.open("num_compile_workers=4"), FOR_TWO)
    found = needs(text)
    assert list(found) == ["programs", "bytes", "disk", "memory", "KV cache", "device", "time"]
    assert found["programs"] == (
        "6 to compile, 2 at a time; num_compile_workers: 4 asked for, the memory is for 2 "
        "(1.37 GB available, each takes 300 MB)"
    )
    assert re.fullmatch(r"[\d.]+ kB to read, [\d.]+ kB to write", found["bytes"])
    assert re.fullmatch(rf".* of [\d.]+ [GT]B free in {fresh.store}", found["disk"])
    assert found["memory"] == "1.37 GB (workers 900 MB, qualification 470 MB) of 1.37 GB available"
    assert re.fullmatch(
        r".* \(parameters [\d.]+ kB, KV cache .*\) of the 64 GB that this machine has: fits", found["device"]
    )
    assert found["KV cache"] == "8 blocks of 16 tokens, derived: what the largest decode bucket fills"
    assert found["time"] == "not known: no step of these kinds has run before"
    assert "REFUSED" not in text


def test_a_plan_is_shown_though_the_build_is_refused(fresh: UserDirectory) -> None:
    ran = furiosa_build(fresh, "plan", "tiny", "target.memory_gb=0.00002")
    assert (ran.status, ran.err) == (0, "")
    assert "that the target has: does not fit\n" in ran.out
    assert re.search(
        r"^A BUILD WOULD BE REFUSED\n  a device of target cpu: .*\n    hint: .*\n0 steps", ran.out, re.MULTILINE
    )


def test_parameters_that_a_host_cannot_keep_in_memory(fresh: UserDirectory) -> None:
    text = plan_text(fresh.open("buckets.decode_buckets=[[1, 1]]"), Machine(2, memory=60_000, available=60 * GB))
    assert "this machine has: does not fit, parameters will be read from the disk again and again" in text
    assert "REFUSED" not in text


def test_when_all_is_done_only_the_device_is_of_interest(built: UserDirectory) -> None:
    assert list(needs(plan_text(built.open(), BIG))) == ["KV cache", "device"]


def test_the_time_that_such_steps_took(built: UserDirectory) -> None:
    build = built.open("name=other", "+quantization.rules=[{match: '*', scheme: none}]")
    assert needs(plan_text(build, BIG))["time"].startswith("about ")
    assert build.estimate_seconds("package") is not None
    another = built.open("quantization=int8", *RANDOM)
    assert re.fullmatch(r"about .*, besides fetch, quantize, .*: not known", needs(plan_text(another, BIG))["time"])
    assert another.estimate_seconds("compile:decode-2x64:last") is not None
    assert another.estimate_seconds("quantize") is None


def test_a_plan_as_json(fresh: UserDirectory, built: UserDirectory) -> None:
    ran = furiosa_build(fresh, "plan", "tiny", "--json")
    assert (ran.status, ran.err, ran.out.count("\n")) == (0, "", 1)
    found = json.loads(ran.out)
    steps = {step["step"]: step for step in found["steps"]}
    assert list(steps) == list(fresh.open().plan.steps)
    assert steps["compile:decode-2x64:block"] == {
        "step": "compile:decode-2x64:block",
        "description": "compile block of decode-2x64 (2 layers) with eager for any",
        "state": "to do",
        "read": 20_000,
        "written": 20_000,
        "seconds": None,
    }
    assert found["read"] == sum(step["read"] for step in steps.values())
    assert found["written"] == sum(step["written"] for step in steps.values())
    assert (found["programs"], found["num_compile_workers"], found["seconds"], found["refused"]) == (6, 1, None, [])
    for need in (*found["disks"], found["memory"], found["device"]):
        assert need["needed"] == sum(need["parts"].values()) > 0
    done = json.loads(furiosa_build(built, "plan", "tiny", "--json").out)
    assert {step["state"] for step in done["steps"]} == {"done"}
    assert (done["read"], done["written"], done["disks"], done["seconds"]) == (0, 0, [], 0)


@pytest.mark.grid
def test_llama3_405b_is_planned_without_weights(
    fresh: UserDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    build = fresh.open(recipe="llama3-405b-fp8")
    figures = build.preflight(machine=BIG)
    source = 2 * build.plan.model.outline.num_parameters
    assert figures.disks[0].parts["download"] == source
    assert source == pytest.approx(811.7 * GB, rel=0.001)
    assert figures.device.parts["KV cache"] == 16 * (4096 + 1) * 126 * 2 * 8 * 128 * 2
    assert figures.device.parts["parameters"] == pytest.approx(410.2 * GB, rel=0.001)
    assert not figures.device.fits
    text = plan_text(build, BIG)
    assert "parameters 410 GB, KV cache 33.8 GB) of the 64 GB that this machine has: does not fit" in text
    # What is there already is not fetched again: files that are wanted, of the revision that is wanted.
    cached = hub / "models--meta-llama--Llama-3.1-405B-Instruct"
    revision = build.spec.model.revision or "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    (cached / "blobs").mkdir()
    for commit, name, size in (
        (revision, "model-00001-of-00191.safetensors", 1000),
        (revision, "config.json", 10),
        (revision, "consolidated.00.pth", 5_000),
        ("f" * 40, "model-00001-of-00191.safetensors", 70_000),
    ):
        (cached / "blobs" / f"{commit[:2]}-{size}").write_bytes(b"x" * size)
        (cached / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (cached / "snapshots" / commit / name).symlink_to(f"../../blobs/{commit[:2]}-{size}")
    again = fresh.open(recipe="llama3-405b-fp8").preflight(machine=BIG)
    assert again.disks[0].parts["download"] == source - 1010
