"""Every kind of bad input: one message that says what is wrong, where, what is valid and what to do; exit status 2;
nothing half-written.

tests/test_recipe/test_mistakes.py has the mistakes that can be made in a recipe's YAML, to the last one.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from user_directory import UserDirectory, furiosa_build, make_new_directory, steps_in_this_process

from furiosa_build.core.errors import UserError
from furiosa_build.runtime import LLM, SamplingParams

from .spoiling import (
    SAVED,
    Spoil,
    artifact,
    config,
    flip_last_bit,
    index,
    move_away,
    occupy,
    remove,
    tensors,
    truncate,
    write,
)


@dataclass(frozen=True)
class Case:
    """A command, what the message must say, and what is spoiled first.

    `finished` are steps that may be done before the mistake can be found: their outputs are right, and kept.
    """

    command: tuple[str, ...]
    words: tuple[str, ...]
    spoil: Spoil = lambda _: None
    finished: frozenset[str] = frozenset()


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """A directory in which a model without and one with a tokenizer have been built. Only read."""
    user = make_new_directory(tmp_path_factory.mktemp("built"))
    small = (
        "buckets.prefill_buckets=[[1,16],[1,32]]",
        "buckets.append_buckets=[]",
        "buckets.decode_buckets=[[1,64]]",
    )
    with steps_in_this_process():
        user.build()
        user.build("backend=eager", *small, "buckets.max_seq_len_to_capture=64", recipe="quickstart")
    return user


@pytest.fixture
def user(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """The same, to be spoiled; the artifacts are copies."""
    shutil.copytree(built.store, tmp_path / "store")
    shutil.copytree(built.root, tmp_path / "user", symlinks=True)
    user = UserDirectory(tmp_path / "user", tmp_path / "store")
    for path in (user.root / "artifacts").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return user


def snapshot(user: UserDirectory) -> dict[Path, bytes | None]:
    """Everything in the user's directory."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(user.root.rglob("*"))}


def actions(user: UserDirectory) -> dict[str, str]:
    """Every action of the store, by key: its step."""
    records = (json.loads(path.read_bytes()) for path in (user.store / "actions").rglob("manifest.json"))
    return {record["key"]: record["step"] for record in records}


def build(*overrides: str) -> tuple[str, ...]:
    return ("build", "tiny", *overrides)


def weights(*words: str, spoil: Spoil) -> Case:
    """A mistake in the weights: found before there is a plan, by their headers."""
    return Case(build(), words, spoil)


FIRST = "model.layers.0.self_attn.q_proj.weight"
NETWORK = ("could not be fetched", "where: model.model_id_or_path", "HF_HUB_OFFLINE is set", "seed_for_random_weight=0")

RECIPES = {
    "unknown recipe": Case(("build", "tinny"), ("there is no recipe 'tinny'", "valid: ", "did you mean 'tiny'?")),
    "unknown recipe to plan": Case(("plan", "tinny"), ("there is no recipe 'tinny'", "did you mean 'tiny'?")),
    "unknown key": Case(build("model.num_layers=2"), ("unknown key model.num_layers=2", "'num_hidden_layers'")),
    "unknown choice": Case(build("buckets=smal"), ("there is no buckets 'smal'", "valid: large, medium", "'small'")),
    "unknown scheme": Case(
        build("quantization.scheme=int5"), ("quantization.scheme: 'int5'", "'none', 'fp8', 'int4' or 'int8'")
    ),
    "unknown backend": Case(
        build("backend.name=inducter"),
        ("unknown backend 'inducter'", "where: backend.name", "did you mean 'inductor'?"),
    ),
    "unknown instruction set": Case(
        build("target.isa=x86-64-v5"),
        ("instruction set 'x86-64-v5'", "where: target.isa", "valid: native, x86-64-v2", "did you mean 'x86-64-v"),
    ),
    "unknown device": Case(build("devices=gpu"), ("the device 'gpu' is not well formed", "valid: cpu, cpu:N, cuda:N")),
    "device that the target has not": Case(
        build("target=cpu", "devices=npu:0:*"), ("target 'cpu' is not an NPU", "target=rngd")
    ),
    "more ranks than divide the heads": Case(
        build("parallel.tensor_parallel_size=3"), ("tensor_parallel_size=3 does not divide the 4 attention heads",)
    ),
    "more stages than layers": Case(
        build("parallel.pipeline_parallel_size=9"), ("pipeline_parallel_size=9 is more than the model's 2 layers",)
    ),
    "buckets that are no list": Case(build("buckets.prefill_buckets=8"), ("8 is not a list of buckets", "[[1, 128]")),
    "a bucket of three": Case(build("buckets.prefill_buckets=[[1,2,3]]"), ("[1, 2, 3] is not [batch, length]",)),
    "a bucket of nothing": Case(build("buckets.decode_buckets=[[0,64]]"), ("[0, 64] is not [batch, length]",)),
    "buckets out of order": Case(
        build("buckets.decode_buckets=[[2,64],[1,64]]"), ("not sorted and unique", "valid: [[1, 64], [2, 64]]")
    ),
    "a bucket too long for the recipe": Case(
        build("buckets.prefill_buckets=[[1,65]]"), ("[1, 65] is longer than max_seq_len_to_capture=64", "valid: ")
    ),
    "buckets too long for the model": Case(
        build("buckets.prefill_buckets=[[1,512]]", "buckets.max_seq_len_to_capture=512"),
        ("max_seq_len_to_capture=512 is more than the model's max_position_embeddings=256", "valid: 1 to 256"),
    ),
    "more layers than there are": Case(
        build("model.num_hidden_layers=3"), ("num_hidden_layers=3 is more than the model's own 2 layers",)
    ),
}

WEIGHTS = {
    "no directory": Case(
        build("model.model_id_or_path=./nowhere"),
        ("model directory './nowhere' does not exist", "or a hub id: org/name"),
    ),
    "no hub": Case(build("model.model_id_or_path=org/model"), ("model 'org/model' (revision main)", *NETWORK)),
    "no hub for the weights": Case(
        ("build", "llama3-8b-fp8", "backend=eager", "model.num_hidden_layers=1"),
        ("model 'meta-llama/Llama-3.1-8B-Instruct' (revision 0e9e39f", *NETWORK),
        finished=frozenset({"partition", "compile"}),
    ),
    "no config.json": Case(build(), ("has no config.json", "where: ", "Hugging Face"), remove("tiny/config.json")),
    "config.json is no JSON": Case(
        build(), ("config.json is not readable JSON", "where: "), write("tiny/config.json", "{")
    ),
    "config.json is a list": Case(
        build(), ("config.json does not hold a JSON object",), write("tiny/config.json", "[]")
    ),
    "no weights": Case(
        build(), ("has no weights", "valid: model.safetensors, or shards"), remove("tiny/model.safetensors")
    ),
    "a shard is missing": Case(
        build(),
        ("weight file model-00002-of-00002.safetensors is missing", "model.safetensors.index.json lists it"),
        index("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    ),
    "an index that leads out": Case(
        build(), ("names a file outside its directory: '../model.safetensors'",), index("../model.safetensors")
    ),
    "an index that leads to the root": Case(
        build(), ("names a file outside its directory: '/etc/passwd'",), index("/etc/passwd")
    ),
    "an index of numbers": Case(
        build(),
        ("names a file outside its directory: 7",),
        index(7),  # type: ignore[arg-type]
    ),
    "an index that is no JSON": Case(
        build(),
        ("model.safetensors.index.json is not readable JSON",),
        write("tiny/model.safetensors.index.json", "{", instead_of="tiny/model.safetensors"),
    ),
    "an index that is a list": Case(
        build(),
        ("model.safetensors.index.json does not hold a JSON object",),
        write("tiny/model.safetensors.index.json", "[1]", instead_of="tiny/model.safetensors"),
    ),
    "weights cut within the header": weights(
        "model.safetensors is not a sound safetensors file",
        "fetch it again",
        spoil=truncate("tiny/model.safetensors", 99),
    ),
    "weights cut within the data": weights(
        "model.safetensors is not a sound safetensors file",
        "fetch it again",
        spoil=truncate("tiny/model.safetensors", -1),
    ),
    "an empty file of weights": weights("not a sound safetensors file", spoil=truncate("tiny/model.safetensors", 0)),
    "a header of absurd size": weights(
        "not a sound safetensors file", spoil=write("tiny/model.safetensors", struct.pack("<Q", 2**62) + b"{}")
    ),
    "a header that is no JSON": weights(
        "not a sound safetensors file", spoil=write("tiny/model.safetensors", struct.pack("<Q", 4) + b"{{{{")
    ),
    "a wrong shape": weights(
        f"parameter {FIRST} has shape [1, 32]",
        "asks for [32, 32]",
        spoil=tensors(lambda t: t.update({FIRST: torch.ones(1, 32)})),
    ),
    "a missing parameter": weights(
        f"the weights lack 1 of 21 parameters: {FIRST}", "do not belong together", spoil=tensors(lambda t: t.pop(FIRST))
    ),
    "gpt2": Case(
        build(),
        ("the weights lack", "transformer.wte.weight", "where: "),
        config(model_type="gpt2", architectures=["GPT2LMHeadModel"]),
    ),
    "mamba": Case(
        build(),
        ("not supported: MambaForCausalLM", "state-space layers"),
        config(model_type="mamba", architectures=["MambaForCausalLM"]),
    ),
    "weights that are quantized": Case(
        build(),
        ("are quantized already", "where: config.json, quantization_config", "name the original model"),
        config(quantization_config={"quant_method": "awq"}),
    ),
    "unknown architecture": Case(
        build(), ("unsupported architecture: model_type 'lama'", "where: config.json"), config(model_type="lama")
    ),
    "config.json lacks a field": Case(
        build(), ("has shape [64, 32], the architecture asks for [32000, 32]",), config(drop=("vocab_size",))
    ),
    "config.json has a wrong field": Case(
        build(),
        ("transformers refuses config.json", "num_hidden_layers", "got str (value: 'two')", "where: config.json"),
        config(num_hidden_layers="two"),
    ),
}

OUTPUT = {
    "a file where the artifacts go": Case(
        build("name=other"),
        ("artifacts/other exists and is not a directory", "where: save_dir, name"),
        occupy("artifacts/other"),
    ),
    "a file of somebody among the artifacts": Case(
        build(),
        ("is not one of artifacts: it holds 'notes.txt'", "where: save_dir, name"),
        occupy("artifacts/tiny/notes.txt"),
    ),
    "a directory of somebody": Case(
        build("save_dir=.", "name=thesis"),
        ("is not one of artifacts: it holds 'chapter-1'",),
        occupy("thesis/chapter-1/text"),
    ),
    "save_dir is a file": Case(
        build("save_dir=file"),
        ("file exists and is not a directory", "where: save_dir", "choose another"),
        occupy("file"),
    ),
    "cache_dir is a file": Case(
        build("cache_dir=file/store"), ("file exists and is not a directory", "where: cache_dir"), occupy("file")
    ),
}

ARTIFACTS = {
    "there is none": ("is not a directory", "valid: the directory of an artifact", move_away("artifacts/tiny")),
    "a directory of something else": (
        "artifact.json is missing",
        "where: ",
        remove(f"{SAVED}/artifact.json"),
    ),
    "no manifest": ("manifest.json is missing", "where: ", remove(f"{SAVED}/manifest.json")),
    "a missing program": (
        "decode-2x64.block.json is missing",
        "again",
        remove(f"{SAVED}/programs/decode-2x64.block.json"),
    ),
    "missing parameters": (
        "00001-of-00001.safetensors is missing",
        "where: ",
        remove(f"{SAVED}/params/stage-0-rank-0-00001-of-00001.safetensors"),
    ),
    "parameters cut short": (
        "by manifest.json",
        "build or copy it again",
        truncate(f"{SAVED}/params/stage-0-rank-0-00001-of-00001.safetensors", -1),
    ),
    "another program": (
        "the sha256 of programs/",
        "build or copy",
        flip_last_bit(f"{SAVED}/programs/decode-2x64.last.json"),
    ),
    "JSON cut short": ("artifact.json has", "build or copy it again", truncate(f"{SAVED}/artifact.json", -5)),
    "another schema version": ("artifact.json is of schema version 1", "valid: 4", artifact(schema_version=1)),
    "another instruction set": (
        "need instruction set 'riscv64'",
        "build it for this machine",
        artifact(target__isa="riscv64"),
    ),
    "another torch": ("need torch 1.13.1, and torch", "pip install torch==1.13.1", artifact(target__torch="1.13.1")),
}

GENERATE = ("generate", "artifacts/quickstart/latest", "--prompt", "It is a truth")
REQUESTS = {
    "temperature": Case((*GENERATE, "--temperature", "-1"), ("temperature does not take -1.0", "valid: >= 0")),
    "top-p": Case((*GENERATE, "--top-p", "0"), ("top_p does not take 0.0", "valid: in (0, 1]")),
    "top-k": Case((*GENERATE, "--top-k", "-2"), ("top_k does not take -2", "valid: 0 or -1 (all), or >= 1")),
    "max-tokens": Case((*GENERATE, "--max-tokens", "-1"), ("max_tokens does not take -1", "valid: >= 0")),
    "seed": Case((*GENERATE, "--seed", str(2**64)), (f"seed does not take {2**64}",)),
    "stop": Case((*GENERATE, "--stop", ""), ("stop does not take", "strings that are not empty")),
    "empty prompt": Case((*GENERATE[:3], ""), ("prompt", "empty")),
    "long prompt": Case((*GENERATE[:3], "word " * 40), ("tokens", "prefill", "1x16", "1x32")),
    "text without a tokenizer": Case(("generate", SAVED, "--prompt", "Hello"), ("tokenizer", "token ids")),
}


def both(name: str, case: tuple[Any, ...]) -> dict[str, Case]:
    *words, spoil = case
    generate = ("generate", SAVED, "--prompt", "x")
    return {f"{name}, {c[0]}": Case(c, tuple(words), spoil) for c in (("inspect", SAVED), generate)}


CASES = {
    **RECIPES,
    **WEIGHTS,
    **OUTPUT,
    **{name: case for entry in ARTIFACTS.items() for name, case in both(*entry).items()},
    **{f"request: {name}": case for name, case in REQUESTS.items()},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input_is_one_message(user: UserDirectory, case: Case) -> None:
    case.spoil(user)
    files, done = snapshot(user), actions(user)

    ran = furiosa_build(user, *case.command)

    assert ran.status == 2, ran.out + ran.err
    assert ran.err.startswith("error: ")
    assert ran.err.count("error: ") == 1
    assert [word for word in case.words if word not in ran.err] == [], ran.err
    assert "Traceback" not in ran.out + ran.err
    assert snapshot(user) == files
    finished = {step.split(":")[0] for key, step in actions(user).items() if key not in done}
    assert finished <= case.finished | {"loading", "survey"}, "what a plan is made from is no step"
    assert not [path for path in (user.store / "sessions").glob("*/*") if path.is_dir()]


def test_a_missing_compiler_is_told_with_both_ways_out(user: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    before = snapshot(user), actions(user)
    ran = furiosa_build(user, *build("backend=inductor"))
    assert (ran.status, ran.out) == (2, "")
    assert "backend inductor needs a C++ compiler, and '/nonexistent' was not found" in ran.err
    assert "apt-get install g++" in ran.err
    assert "backend=eager" in ran.err
    assert (snapshot(user), actions(user)) == before
    assert furiosa_build(user, *build()).status == 0, "the eager backend needs none"


def test_token_ids_that_are_too_many_are_refused_with_the_buckets(built: UserDirectory) -> None:
    llm = LLM(built.root / SAVED)
    with pytest.raises(UserError, match="33 tokens") as caught:
        llm.generate([[1, 2, 3], [1] * 33], SamplingParams(max_tokens=1))
    assert "1x32" in str(caught.value)
    assert not llm.engine.has_unfinished_requests()
