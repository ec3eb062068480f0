"""A small artifact that is sound: its files, and how they are sealed by digests."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from furiosa_build.artifact.schema import Artifact, FileRecord, Manifest, Timestamp, artifact_id, to_json

PARAMETERS = "params/p.safetensors"
PROGRAM = "programs/first.so"


def artifact_data() -> dict[str, Any]:
    return {
        "schema_version": 4,
        "metadata": {
            "artifact_id": "",
            "name": "small",
            "version": {"furiosa_llm": "0", "furiosa_compiler": "none 0"},
        },
        "devices": "cpu",
        "generator_config": {
            "prefill_buckets": [[1, 8]],
            "append_buckets": [],
            "decode_buckets": [],
            "max_seq_len_to_capture": 8,
            "paged_attention_num_blocks": 4,
            "paged_attention_block_size": 1,
            "calculate_logit_only_for_last_token": False,
            "kv_cache_sharing_across_beams_config": None,
            "default_scheduler_config": {
                "npu_queue_limit": 2,
                "max_processing_samples": 8,
                "spare_blocks_ratio": 0.2,
                "is_offline": False,
                "prefill_chunk_size": None,
            },
        },
        "hf_config": {"eos_token_id": 0},
        "model_metadata": {
            "pretrained_id": "small",
            "revision": None,
            "weights_digest": "0",
            "seed_for_random_weight": 1,
            "architecture": "Small",
            "dtype": "float32",
            "num_hidden_layers": 0,
            "layer_prefix": "model.layers.",
            "vocab_size": 4,
            "num_parameters": 4,
            "quantization": "none",
        },
        "model_rewriting_config": {
            "use_blockwise_compile": True,
            "num_blocks_per_supertask": 1,
            "do_decompositions_for_model_rewrite": False,
            "embed_all_constants_into_graph": False,
            "add_prefill_last_block_slice": False,
            "calculate_logit_only_for_last_token": False,
        },
        "parallel_config": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1},
        "backend": "eager",
        "target": {"name": "cpu", "num_elements": 1, "isa": "any", "torch": version("torch")},
        "programs": {"first": {"file": PROGRAM, "kind": "first", "inputs": [], "outputs": []}},
        "pipelines": [
            {
                "name": "prefill-1x8",
                "phase": "prefill",
                "batch_size": 1,
                "query_length": 8,
                "context_length": 8,
                "supertasks": [
                    {
                        "kind": "comp",
                        "program": "first",
                        "stage": 0,
                        "ranks": [0],
                        "inputs": {},
                        "outputs": ["logits"],
                    }
                ],
            }
        ],
        "parameters": [{"stage": 0, "rank": 0, "files": [PARAMETERS]}],
        "kv_cache": [],
    }


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def safetensors(header: Any, data: bytes = bytes(8)) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + data


def seal(root: Path, data: dict[str, Any] | None = None) -> None:
    """artifact.json and manifest.json that fit what lies in `root`."""
    files = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name not in ("artifact.json", "manifest.json", "timestamp.json"):
            content = path.read_bytes()
            record = FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())
            files[path.relative_to(root).as_posix()] = record
    data = data or artifact_data()
    if (draft := data.get("draft")) is not None:
        own = {name: record for name, record in files.items() if name.startswith("draft/")}
        draft["metadata"]["artifact_id"] = artifact_id(Artifact.model_validate(draft), own)
    data["metadata"]["artifact_id"] = id_ = artifact_id(Artifact.model_validate(data), files)
    content = to_json(Artifact.model_validate(data))
    files["artifact.json"] = FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    (root / "artifact.json").write_bytes(content)
    (root / "manifest.json").write_bytes(to_json(Manifest(artifact_id=id_, files=files)))
    (root / "timestamp.json").write_bytes(to_json(Timestamp.of(id_, 1)))
