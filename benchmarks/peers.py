"""This project beside the engines that people would take instead: `make peers`, then `python benchmarks/peers.py`.

A model of random weights (`--shape 1b` or `8b`, `--layers N`) is built or exported by each that is installed, then run:
in each round every engine loads it, computes the cases and ends, so that what the machine does meanwhile meets all of
them. Between them the rate at which memory is read is measured. Prints a table of medians, writes them as JSON
(`--json FILE`); `--write` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from furiosa_build.backends.cpu import processor_name

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAMS = REPOSITORY / "benchmarks" / "peer_programs"
ENVIRONMENTS = REPOSITORY / ".venv-peers"
DOCUMENT = REPOSITORY / "docs" / "performance.md"
BEGIN, END = "<!-- peers: written by benchmarks/peers.py -->", "<!-- peers: end -->"

PEERS: dict[str, tuple[str, ...]] = {
    "furiosa_build": ("bf16", "int8", "w8a8", "fp8", "int4", "int4-head-int8", "w4a8"),
    "openvino": ("int8", "int4"),
    "vllm": ("bf16",),
    "llama_cpp": ("bf16", "q8_0", "q4_0"),
    "onnxruntime_genai": ("int4",),
    "transformers": ("bf16",),
}
OWN = ("furiosa_build", "transformers")
"""Those of them that run in this project's environment."""
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tied": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128, "tied": False},
}
CASES: dict[str, Any] = {
    "prefill": [128, 512, 2048],
    "decode": [[1, 64], [1, 1024], [1, 4096], [8, 64], [8, 1024], [32, 64]],
    "steps": 16,
}
QUICK: dict[str, Any] = {"prefill": [128, 512], "decode": [[1, 64], [1, 512], [8, 64]], "steps": 8}


@dataclass
class Contestant:
    """An engine and a format: where it lies and what was measured of it."""

    engine: str
    format: str
    work: Path
    prepared: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None

    @property
    def name(self) -> str:
        """Such as `openvino int4`."""
        return f"{self.engine} {self.format}"

    @property
    def is_installed(self) -> bool:
        """Whether `make peers` has installed it."""
        return self.engine in OWN or (ENVIRONMENTS / self.engine / ".installed").exists()

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return Path(sys.executable) if self.engine in OWN else ENVIRONMENTS / self.engine / "bin" / "python"

    def run(self, task: str, model: Path, cases: dict[str, Any]) -> dict[str, Any]:
        """Runs its program and returns what that has found. Raises RuntimeError with the end of its log."""
        command = [
            self.python,
            PROGRAMS / f"run_{self.engine}.py",
            task,
            model,
            self.work,
            self.format,
            json.dumps(cases),
        ]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        if ran.returncode:
            raise RuntimeError(f"{self.name}: {task} ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        return found


def main() -> None:
    arguments = parse()
    cases = QUICK if arguments.quick else CASES
    with tempfile.TemporaryDirectory(prefix="furiosa-build-peers-", dir=arguments.work) as directory:
        work = Path(directory)
        model = make_model(work / "model", arguments.shape, arguments.layers)
        contestants = [
            contestant
            for engine in arguments.engines or PEERS
            for format_ in PEERS[engine]
            if (contestant := Contestant(engine, format_, work / f"{engine}-{format_}")).is_installed
        ]
        for one in contestants:
            attempt(one, "prepare", model, cases)
        limits = [read_rate(work)]
        for number in range(arguments.rounds):
            order = contestants[number % len(contestants) :] + contestants[: number % len(contestants)]
            for one in order:
                attempt(one, "measure", model, cases)
                limits.append(read_rate(work))
            print(f"round {number + 1} of {arguments.rounds} is done", file=sys.stderr, flush=True)
    result = result_of(arguments, cases, contestants, limits)
    if not result["measured"]:
        sys.exit("nothing could be measured")
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.write:
        write(table(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("engines", nargs="*", choices=[[], *PEERS], help="default: all that are installed")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter cases")
    parser.add_argument("--work", type=Path, help="where models are written; some 15 GB for 1b")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    return parser.parse_args()


def make_model(directory: Path, shape: str, layers: int | None) -> Path:
    """A Llama of the shape in bfloat16, with random weights, and the quickstart's tokenizer with as many words more as
    the vocabulary has room for."""
    sizes = dict(SHAPES[shape])
    tied = sizes.pop("tied")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "num_hidden_layers": layers or sizes["num_hidden_layers"],
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    source = REPOSITORY / "examples" / "quickstart" / "model"
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"Ġword{number}": number for number in range(len(vocabulary), config["vocab_size"])}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(*size, dtype=torch.bfloat16)
        if len(size) == 1
        else torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for name, size in parameters(config)
    }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def parameters(config: dict[str, Any]) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Names and sizes of a Llama's parameters."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries, keys = (
        config["num_attention_heads"] * config["head_dim"],
        config["num_key_value_heads"] * config["head_dim"],
    )
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
        for name, size in {
            "q": (queries, hidden),
            "k": (keys, hidden),
            "v": (keys, hidden),
            "o": (hidden, queries),
        }.items():
            yield f"{layer}self_attn.{name}_proj.weight", size
        for name, size in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            yield f"{layer}mlp.{name}_proj.weight", size
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, hidden)


def attempt(one: Contestant, task: str, model: Path, cases: dict[str, Any]) -> None:
    """Prepares or measures a contestant; one that has failed is not tried again."""
    if one.failure:
        return
    try:
        figures = one.run(task, model, cases)
    except RuntimeError as error:
        one.failure = str(error)
        print(error, file=sys.stderr, flush=True)
        return
    if task == "prepare":
        one.prepared = figures
    else:
        one.rounds.append(figures)
    print(f"{one.name:24} {task} {json.dumps(figures)}", file=sys.stderr, flush=True)


def read_rate(work: Path) -> float:
    """Bytes a second that all cores together read from memory: the best of some runs."""
    library, size = work / "limits.so", 512 << 20
    if not library.exists():
        source = REPOSITORY / "benchmarks" / "limits.cpp"
        command = ["g++", "-std=c++17", "-O2", "-march=native", "-shared", "-fPIC", source, "-o", library]
        subprocess.run(command, check=True)
    read_all = ctypes.CDLL(str(library)).read_all
    read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    memory, threads = torch.ones(size // 8, dtype=torch.int64), len(os.sched_getaffinity(0))
    part, best = size // threads, 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            begin = time.perf_counter()
            list(pool.map(lambda i: read_all(memory.data_ptr() + i * part, part), range(threads)))
            best = max(best, size / (time.perf_counter() - begin))
    return best


def result_of(
    arguments: argparse.Namespace, cases: dict[str, Any], contestants: Sequence[Contestant], limits: list[float]
) -> dict[str, Any]:
    """What was measured, as JSON: rates in tokens a second."""
    measured = {}
    for one in contestants:
        if one.rounds:
            measured[one.name] = {
                "build_s": one.prepared["seconds"],
                "build_memory": one.prepared["memory"],
                "load_s": statistics.median(found["load"] for found in one.rounds),
                "memory": max(found["memory"] for found in one.rounds),
                "prefill": {
                    str(tokens): tokens / statistics.median(found["prefill"][str(tokens)] for found in one.rounds)
                    for tokens in cases["prefill"]
                },
                "decode": {
                    f"{batch}x{context}": batch
                    / statistics.median(found["decode"][f"{batch}x{context}"] for found in one.rounds)
                    for batch, context in cases["decode"]
                },
            }
    return {
        "machine": f"{processor_name()}, {len(os.sched_getaffinity(0))} cores",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "shape": arguments.shape if arguments.layers is None else f"{arguments.shape}, {arguments.layers} layers",
        "rounds": arguments.rounds,
        "read_rate": statistics.median(limits),
        "failed": {one.name: one.failure for one in contestants if one.failure},
        "measured": measured,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: tokens a second of prefill by length of the prompt and of decode by batch and context."""
    measured = result["measured"]
    some = next(iter(measured.values()))
    columns = [("prefill", key) for key in some["prefill"]] + [("decode", key) for key in some["decode"]]
    heads = ["", *(f"{kind} {key}" for kind, key in columns), "build s", "build MB", "load s", "MB"]
    rows = [
        [
            name,
            *(f"{figures[kind][key]:.4g}" for kind, key in columns),
            f"{figures['build_s']:.0f}",
            f"{figures['build_memory'] / 1e6:.0f}",
            f"{figures['load_s']:.1f}",
            f"{figures['memory'] / 1e6:.0f}",
        ]
        for name, figures in measured.items()
    ]
    ours, others = (
        [m for name, m in measured.items() if name.startswith("furiosa_build") == own] for own in (True, False)
    )
    if ours and others:
        ratios = (max(m[kind][key] for m in ours) / max(m[kind][key] for m in others) for kind, key in columns)
        rows.append(["best of ours / best peer", *(f"{ratio:.2f}x" for ratio in ratios), "", "", "", ""])
    lines = [heads, ["---"] * len(heads), *rows]
    return (
        f"{result['machine']}, {result['date']}; shape {result['shape']}, medians of {result['rounds']} rounds; "
        f"tokens a second; memory is read at {result['read_rate'] / 1e9:.0f} GB/s.\n\n"
        + "\n".join(f"| {' | '.join(line)} |" for line in lines)
    )


def write(text: str) -> None:
    """Puts the table into docs/performance.md."""
    document = DOCUMENT.read_text()
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
