"""A toy model and its artifact: cheap, deterministic, and wrong at once when a KV slot or a position is
wrong.

A token's state is a number modulo P. A layer stores each token's state and position in its KV slot, and gives
every token a sum over all tokens up to it of what the slots hold, weighted by their place. The logits are a
row of a table. So each token depends on every slot before it, through two layers. `expected` computes the
same without any cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from furiosa_build.artifact.schema import Artifact, FileRecord, Manifest, Timestamp, artifact_id, to_json
from furiosa_build.backends.base import Backend
from furiosa_build.backends.torch_device import TorchDevice

P = 997
BYTES = 256
EOS, BOS = 256, 257
VOCAB = 258
COEFFICIENTS = (31, 57)


def table() -> Tensor:
    """float32 [P, VOCAB]: the logits of each state."""
    return torch.randn(P, VOCAB, generator=torch.Generator().manual_seed(5))


def logits_after(tokens: Sequence[int]) -> Tensor:
    """float32 [VOCAB]: what the toy model gives for the last of `tokens`."""
    return table()[state_after(tokens)]


def state_after(tokens: Sequence[int]) -> int:
    """Row of the table."""
    states = [(token + 1) * (position + 5) % P for position, token in enumerate(tokens)]
    for coefficient in COEFFICIENTS:
        total, outputs = 0, []
        for place, state in enumerate(states):
            total += state * (place + 3) * (place + 7)
            outputs.append(total % P * coefficient % P)
        states = outputs
    return states[-1]


def expected(prompt: Sequence[int], number: int) -> list[int]:
    """The greedy continuation of `prompt` by `number` tokens."""
    tokens = list(prompt)
    for _ in range(number):
        tokens.append(int(logits_after(tokens).argmax()))
    return tokens[len(prompt) :]


class ToyBackend(Backend):
    """Loads a program file that says which of the functions below to run."""

    name = "toy"

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def isa(self, requested: str) -> str:
        return requested

    def compile(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the programs are written by hand")

    def load(self, program: Path, concurrency: int = 1, entry: str | None = None) -> ToyProgram:
        del concurrency, entry
        self.loaded.append(program.name)
        return ToyProgram(program.read_text())

    def device(self) -> TorchDevice:
        return TorchDevice()


class ToyProgram:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [getattr(self, self.kind)(*inputs)]

    def first(self, ids: Tensor, positions: Tensor) -> Tensor:
        return (ids + 1) * (positions + 5) % P

    def prefill(
        self,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor,
        coefficient: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        keys[slots] = hidden
        values[slots] = positions
        places = torch.arange(hidden.shape[1])
        terms = keys[slots] * (places + 3) * (values[slots] + 7)
        return terms.cumsum(1) % P * coefficient % P

    def decode(
        self,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor,
        context: Tensor,
        lengths: Tensor,
        coefficient: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        keys[slots] = hidden
        values[slots] = positions
        places = torch.arange(context.shape[1])
        terms = keys[context] * (places + 3) * (values[context] + 7) * (places < lengths[:, None])
        return terms.sum(1, keepdim=True) % P * coefficient % P

    def append(
        self,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor,
        context: Tensor,
        coefficient: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        keys[slots] = hidden
        values[slots] = positions
        places = torch.arange(context.shape[1])
        terms = keys[context] * (places + 3) * (values[context] + 7)
        return terms.cumsum(1).gather(1, positions) % P * coefficient % P

    def last(self, hidden: Tensor, table: Tensor) -> Tensor:
        return table[hidden]

    def last_only(self, hidden: Tensor, indices: Tensor, table: Tensor) -> Tensor:
        return table[hidden.gather(1, indices[:, None])]


def byte_tokenizer() -> Tokenizer:
    """Token i is byte i; the two above are special."""
    alphabet = byte_alphabet()
    tokenizer = Tokenizer(models.BPE({alphabet[byte]: byte for byte in range(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<bos>"])
    return tokenizer


def byte_alphabet() -> list[str]:
    """The character that byte-level BPE writes for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(BYTES)]


DEFAULT_BUCKETS: dict[str, list[tuple[int, ...]]] = {
    "prefill": [(1, 8), (1, 16), (4, 8)],
    "decode": [(1, 24), (4, 24), (2, 48)],
}


def artifact_data(
    buckets: Mapping[str, Sequence[tuple[int, ...]]] = DEFAULT_BUCKETS,
    *,
    block_size: int = 4,
    num_blocks: int = 64,
    last_only: bool = False,
    spare_blocks_ratio: float = 0.0,
    max_processing_samples: int = 1000,
    prefill_chunk_size: int | None = None,
    is_offline: bool = False,
    beams: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """artifact.json of the toy model, without its id."""
    programs: dict[str, Any] = {}
    pipelines = []
    for phase, sizes in buckets.items():
        pipelines += [_pipeline(programs, phase, size, last_only) for size in sizes]
    return {
        "schema_version": 4,
        "metadata": {
            "artifact_id": "",
            "name": "toy",
            "version": {"furiosa_llm": "0", "furiosa_compiler": "toy 0"},
        },
        "devices": "cpu",
        "generator_config": {
            "prefill_buckets": list(buckets.get("prefill", [])),
            "append_buckets": list(buckets.get("append", [])),
            "decode_buckets": list(buckets.get("decode", [])),
            "max_seq_len_to_capture": 48,
            "paged_attention_num_blocks": num_blocks,
            "paged_attention_block_size": block_size,
            "calculate_logit_only_for_last_token": last_only,
            "kv_cache_sharing_across_beams_config": beams and {"beam_width": beams[0], "max_new_tokens": beams[1]},
            "default_scheduler_config": {
                "npu_queue_limit": 2,
                "max_processing_samples": max_processing_samples,
                "spare_blocks_ratio": spare_blocks_ratio,
                "is_offline": is_offline,
                "prefill_chunk_size": prefill_chunk_size,
            },
        },
        "hf_config": {"eos_token_id": EOS},
        "model_metadata": {
            "pretrained_id": "toy",
            "revision": None,
            "weights_digest": "0",
            "seed_for_random_weight": 5,
            "architecture": "Toy",
            "dtype": "float32",
            "num_hidden_layers": 2,
            "layer_prefix": "layers.",
            "vocab_size": VOCAB,
            "num_parameters": P * VOCAB,
            "quantization": "none",
        },
        "model_rewriting_config": {
            "use_blockwise_compile": True,
            "num_blocks_per_supertask": 1,
            "do_decompositions_for_model_rewrite": False,
            "embed_all_constants_into_graph": False,
            "add_prefill_last_block_slice": False,
            "calculate_logit_only_for_last_token": last_only,
        },
        "parallel_config": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1},
        "backend": "toy",
        "target": {"name": "toy", "num_elements": 1, "isa": "any", "torch": "any"},
        "programs": programs,
        "pipelines": pipelines,
        "parameters": [{"stage": 0, "rank": 0, "files": ["params/toy.safetensors"]}],
        "kv_cache": [{"layer": i, "stage": 0, "dtype": "int64", "shape_per_slot": []} for i in range(2)],
    }


def _pipeline(programs: dict[str, Any], phase: str, size: tuple[int, ...], last_only: bool) -> dict[str, Any]:
    """`size` is (batch, tokens), of append (batch, new tokens, tokens)."""
    batch, *middle, length = size
    tokens = [batch, middle[0] if middle else length if phase == "prefill" else 1]
    context = {} if phase == "prefill" else {"context_slots": [batch, length]}
    if phase == "decode":
        context["context_lens"] = [batch]
    fed = {"position_ids": tokens, "slot_mapping": tokens, **context}
    indices = {"logits_indices": [batch]} if last_only else {}
    rows = 1 if last_only else tokens[1]
    name = f"{phase}-{'x'.join(map(str, size))}"
    programs[f"first-{name}"] = _program(
        "first",
        {"input_ids": tokens, "position_ids": tokens},
        [],
        _tensor("hidden", "activation", "int64", tokens),
    )
    programs[f"block-{name}"] = _program(
        phase,
        {"hidden": tokens, **fed},
        [
            _tensor("coefficient", "parameter", "int64", [1], 0),
            _tensor("key_cache", "kv_cache", "int64", [None], 0),
            _tensor("value_cache", "kv_cache", "int64", [None], 0),
        ],
        _tensor("out", "activation", "int64", tokens),
    )
    programs[f"last-{name}"] = _program(
        "last_only" if last_only else "last",
        {"hidden": tokens, **indices},
        [_tensor("table", "parameter", "float32", [P, VOCAB])],
        _tensor("logits", "activation", "float32", [batch, rows, VOCAB]),
    )
    same = {name: name for name in fed}
    return {
        "name": name,
        "phase": phase,
        "batch_size": batch,
        "query_length": tokens[1],
        "context_length": length,
        "supertasks": [
            _task(f"first-{name}", {"input_ids": "input_ids", "position_ids": "position_ids"}, ["hidden.0"]),
            _task(f"block-{name}", {"hidden": "hidden.0", **same}, ["hidden.1"], [0]),
            _task(f"block-{name}", {"hidden": "hidden.1", **same}, ["hidden.2"], [1]),
            _task(f"last-{name}", {"hidden": "hidden.2", **{name: name for name in indices}}, ["logits"]),
        ],
    }


def _program(kind: str, activations: dict[str, list[int]], others: list[Any], output: Any) -> dict[str, Any]:
    inputs = [_tensor(name, "activation", "int64", shape) for name, shape in activations.items()]
    return {"file": f"programs/{kind}.toy", "kind": kind, "inputs": inputs + others, "outputs": [output]}


def _tensor(name: str, role: str, dtype: str, shape: Sequence[int | None], block: int | None = None) -> dict[str, Any]:
    return {"name": name, "role": role, "dtype": dtype, "shape": list(shape), "block": block}


def _task(program: str, inputs: dict[str, str], outputs: list[str], layers: Sequence[int] = ()) -> dict[str, Any]:
    return {
        "kind": "comp",
        "program": program,
        "stage": 0,
        "ranks": [0],
        "inputs": inputs,
        "outputs": outputs,
        "layers": list(layers),
    }


def write_artifact(
    directory: Path,
    data: dict[str, Any] | None = None,
    *,
    tokenizer: bool = True,
    parameters: Mapping[str, Tensor] | None = None,
    draft_parameters: Mapping[str, Tensor] | None = None,
    model_files: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the toy model's artifact into `directory`. `model_files` are texts, or values for JSON."""
    data = data or artifact_data()
    for name in ("params", "programs", "model"):
        (directory / name).mkdir(parents=True)
    for program in data["programs"].values():
        (directory / program["file"]).write_text(program["kind"])
    tensors = parameters or default_parameters()
    save_file(dict(tensors), directory / "params" / "toy.safetensors")
    if data.get("draft"):
        for name in ("params", "programs"):
            (directory / "draft" / name).mkdir(parents=True)
        for program in data["draft"]["programs"].values():
            (directory / program["file"]).write_text(program["kind"])
        save_file(dict(draft_parameters or tensors), directory / "draft" / "params" / "toy.safetensors")
    if tokenizer:
        byte_tokenizer().save(str(directory / "model" / "tokenizer.json"))
    for name, content in (model_files or {}).items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / "model" / name).write_text(text)
    seal(directory, data)
    return directory


def default_parameters() -> dict[str, Tensor]:
    layers = {f"layers.{i}.coefficient": torch.tensor([value]) for i, value in enumerate(COEFFICIENTS)}
    return {"table": table(), **layers}


def with_draft(data: dict[str, Any], draft: dict[str, Any], number: int) -> dict[str, Any]:
    """artifact.json of `data` with a draft that proposes `number` tokens at a time."""
    files = {name: {**program, "file": f"draft/{program['file']}"} for name, program in draft["programs"].items()}
    parameters = [{"stage": 0, "rank": 0, "files": ["draft/params/toy.safetensors"]}]
    config = {**data["generator_config"], "num_speculative_tokens": number}
    return {**data, "generator_config": config, "draft": {**draft, "programs": files, "parameters": parameters}}


def draft_parameters(noise: float) -> dict[str, Tensor]:
    """Those of a draft that is the toy model, but for noise of that standard deviation on its logits."""
    other = torch.randn(P, VOCAB, generator=torch.Generator().manual_seed(6))
    return {**default_parameters(), "table": table() + noise * other}


def seal(directory: Path, data: dict[str, Any]) -> None:
    """Writes artifact.json and manifest.json for what lies in `directory`."""
    files = {
        path.relative_to(directory).as_posix(): FileRecord(size=path.stat().st_size, sha256=_digest(path.read_bytes()))
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("artifact.json", "manifest.json", "timestamp.json")
    }
    artifact = Artifact.model_validate(data)
    if artifact.draft is not None:
        own = {name: record for name, record in files.items() if name.startswith("draft/")}
        artifact = artifact.model_copy(update={"draft": with_id(artifact.draft, own)})
    artifact = with_id(artifact, files)
    id_ = artifact.metadata.artifact_id
    content = to_json(artifact)
    files["artifact.json"] = FileRecord(size=len(content), sha256=_digest(content))
    (directory / "artifact.json").write_bytes(content)
    (directory / "manifest.json").write_bytes(to_json(Manifest(artifact_id=id_, files=files)))
    (directory / "timestamp.json").write_bytes(to_json(Timestamp.of(id_, 1)))


def with_id(artifact: Artifact, files: dict[str, FileRecord]) -> Artifact:
    """The artifact with the id of its content."""
    metadata = artifact.metadata.model_copy(update={"artifact_id": artifact_id(artifact, files)})
    return artifact.model_copy(update={"metadata": metadata})


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
