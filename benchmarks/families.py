"""Which families of transformers are built, and equal it: `python benchmarks/families.py [MODEL_TYPE ...] [--write]`.

Every model type of a causal language model is made in a small shape with random weights, surveyed, built with backend
eager, run, and compared with transformers: the logits of each of 16 greedy tokens of a short and of a long prompt in
one batch, over prefill, append and decode buckets. Prints rows of a table; `--write` puts each into docs/models.md as
soon as it is known, so that a run that was stopped goes on with the types that are left.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import closing, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from furiosa_build.artifact.reader import open_artifact
from furiosa_build.build.build import Build
from furiosa_build.build.executors.in_process import InProcess
from furiosa_build.core.errors import BuildError, UserError
from furiosa_build.models.checks import check_model
from furiosa_build.models.refusals import failures_of
from furiosa_build.models.skeleton import Skeleton
from furiosa_build.recipe.schema import (
    BackendSpec,
    BucketSpec,
    BuildOptions,
    BuildSpec,
    ModelSpec,
    Recipe,
    TargetSpec,
)
from furiosa_build.runtime import SamplingParams
from furiosa_build.runtime.engine import LLMEngine

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"

SIZES: dict[str, Any] = {
    # The same sizes under the names that different families have for them; a family gets those that its config has.
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 192),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "n_inner"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"), 4
    ),
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("sliding_window", "window_size", "rotary_dim", "hidden_size_per_layer_input"), 8),
    # Mixtures of experts.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    "expert_ffn_hidden_size": 32,
    **dict.fromkeys(
        ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "moe_num_shared_experts"), 1
    ),
    # Multi-head latent attention: heads of keys have 24 numbers, those of values 16.
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 16),
    "qk_rope_head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_SHARED_KEYS = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
SPECIAL: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "gemma4_unified_text"), _SHARED_KEYS),
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8},
    "zamba2": {"num_hidden_layers": 54},  # as its list of types of layers
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs beside that, so that the sizes fit together, and so that what is special of it is there."""

BUCKETS = {
    "prefill_buckets": [[1, 16]],
    "append_buckets": [[1, 16, 64]],
    "decode_buckets": [[2, 64]],
    "max_seq_len_to_capture": 64,
    "paged_attention_block_size": 16,
}
PROMPTS = [[(7 * i) % 190 for i in range(6)], [(11 * i + 3) % 190 for i in range(40)]]
"""The second is longer than the prefill bucket, than sliding windows, and than chunks."""
NEW_TOKENS = 16
MOST_PARAMETERS = 5_000_000


TABLE = "| model type | class | | why |\n|---|---|---|---|\n"
"""What the table of the page begins with; it is the last thing there."""


@dataclass(frozen=True)
class Verdict:
    """What came out for a family: `equal`, `refused` or `wrong`; and why."""

    model_type: str
    name: str
    result: str
    reason: str = ""

    @property
    def row(self) -> str:
        """A row of the table."""
        return f"| `{self.model_type}` | {self.name} | {self.result} | {self.reason} |"


_OTHER_PARTS = ("text", "vision", "audio", "vq", "coder")


def families() -> dict[str, str]:
    """Model type -> class, of all causal language models of text; the text parts of others have types of their own."""
    return {
        model_type: name
        for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if not any(part in sub for sub in CONFIG_MAPPING[model_type].sub_configs for part in _OTHER_PARTS)
    }


def smallest(model_type: str) -> dict[str, Any]:
    """The fields of a small config.json of a family."""
    default = CONFIG_MAPPING[model_type]().to_dict()
    known = {name: size for name, size in SIZES.items() if name in default}
    if "qk_rope_head_dim" in known:
        known.pop("head_dim", None)  # it follows from that
    if "kv_lora_rank" in known:
        known["num_key_value_heads"] = known["num_attention_heads"]
    return {"model_type": model_type, "dtype": "float32", **known, **SPECIAL.get(model_type, {})}


def judge(model_type: str, work: Path, fields: Mapping[str, Any] | None = None) -> Verdict:
    """Builds a family's small model, and compares what it generates with transformers. Raises what goes wrong.

    `fields`: Of its config.json, in the place of those that it has else.
    """
    name = families()[model_type]
    config = {**smallest(model_type), **(fields or {})}
    try:
        skeleton = Skeleton(dict(config))
        with failures_of(skeleton.model):
            check_model(skeleton)
    except UserError as error:  # as `plan` says, but before transformers makes the model with weights
        return Verdict(model_type, name, "refused", _reason(error))
    model = _save(config, work / "model")
    spec = BuildSpec(
        name="family",
        model=ModelSpec(model_id_or_path=str(work / "model")),
        target=TargetSpec(name="cpu"),
        backend=BackendSpec(name="eager"),
        buckets=BucketSpec.model_validate(BUCKETS),
    )
    options = BuildOptions(save_dir=str(work / "artifacts"), cache_dir=str(work / "store"))
    try:
        build = Build(Recipe(spec=spec, options=options, roots=(work,)))
        here = InProcess(build.files.inputs)
        build.executors.update(builder=here, compiler=here)
        steps = [step for step in build.plan.steps if step != "qualify"]
    except BuildError as error:
        return Verdict(model_type, name, "refused", _reason(error))
    for step in steps:
        build.run(step)
    worst = max(_difference(model, tokens, logits) for tokens, logits in _generate(build.version_directory))
    if worst < 1e-4:
        return Verdict(model_type, name, "equal")
    return Verdict(model_type, name, "wrong", f"logits differ by {worst:.1g} of the largest")


def _reason(error: BuildError) -> str:
    return str(error).splitlines()[0].removeprefix("not supported: ")


def _save(config: dict[str, Any], directory: Path) -> PreTrainedModel:
    """A model whose weights are large enough for every part of it to show in the logits, as transformers saves it."""
    fields = dict(config)
    made = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        numbers = AutoModelForCausalLM.from_config(made, dtype=torch.float32).num_parameters()
    if numbers > MOST_PARAMETERS:
        raise ValueError(f"{numbers} parameters: SIZES has no names for what makes this family large")
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_((0.5 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5) * noise)
    with redirect_stderr(io.StringIO()):  # it draws a progress bar
        model.save_pretrained(directory, save_original_format=False)
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    eager: PreTrainedModel = loaded.eval()
    return eager


def _generate(artifact: Path) -> Iterator[tuple[list[int], torch.Tensor]]:
    """For each prompt all its tokens, and the logits of the new ones [new, vocabulary]."""
    logits: dict[str, list[torch.Tensor]] = {}
    engine = LLMEngine(
        open_artifact(artifact),
        on_logits=lambda request, row: logits.setdefault(request, []).append(torch.tensor(row)),
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with closing(engine):
        for number, prompt in enumerate(PROMPTS):
            engine.add_request(str(number), prompt, greedy)
        while engine.has_unfinished_requests():
            for result in engine.step():
                if result.finished:
                    tokens = [*result.prompt_token_ids, *result.outputs[0].token_ids]
                    yield tokens, torch.stack(logits[result.request_id])


def _difference(model: PreTrainedModel, tokens: list[int], logits: torch.Tensor) -> float:
    """The largest difference from transformers' logits, as a share of the largest logit; of that sequence alone."""
    with torch.no_grad():
        expected = model(torch.tensor([tokens[:-1]])).logits[0, -len(logits) :]
    return float((logits - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def main(arguments: list[str]) -> None:
    logging.disable(logging.WARNING)
    chosen = [argument for argument in arguments if not argument.startswith("-")]
    for model_type in chosen or families():
        with tempfile.TemporaryDirectory() as work:
            try:
                verdict = judge(model_type, Path(work))
            except Exception as error:
                traceback.print_exc()
                verdict = Verdict(model_type, families()[model_type], "crash", f"{type(error).__name__}: {error}")
        print(verdict.row, flush=True)
        if "--write" in arguments:
            write(verdict)


def write(verdict: Verdict) -> None:
    """Puts a row into the page's table, in the place of the one that it has."""
    before, _, table = DOCUMENT.read_text().partition(TABLE)
    rows = {row.split("`")[1]: row for row in table.splitlines()} | {verdict.model_type: verdict.row}
    DOCUMENT.write_text(before + TABLE + "".join(f"{rows[name]}\n" for name in families() if name in rows))


if __name__ == "__main__":
    main(sys.argv[1:])
