"""Outlines and BuildSpecs made by hand, so that planning is tested without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from furiosa_build.ir.outline import KindOutline, Outline, ParameterOutline
from furiosa_build.plan.budget.sizes import kv_cache_bytes_of
from furiosa_build.plan.model import ModelPlan, plan_model
from furiosa_build.plan.planner import Plan, make_plan
from furiosa_build.recipe.schema import BuildSpec
from furiosa_build.steps.registry import STEPS

NORM, QUERY, DOWN = "norm.weight", "attn.q_proj.weight", "mlp.down_proj.weight"
"""The parameters of a layer: a norm and two linear layers."""


def outline(layers: int = 3, *, sliding: tuple[int, ...] = ()) -> Outline:
    """A model of `layers` layers. Those in `sliding` trace to another graph than the others."""
    shapes = {
        "model.embed_tokens.weight": [100, 8],
        "model.norm.weight": [8],
        "lm_head.weight": [100, 8],
        **{f"model.layers.{i}.{NORM}": [8] for i in range(layers)},
        **{f"model.layers.{i}.{QUERY}": [8, 8] for i in range(layers)},
        **{f"model.layers.{i}.{DOWN}": [8, 16] for i in range(layers)},
    }
    kinds = {"full": [i for i in range(layers) if i not in sliding], "sliding": list(sliding)}
    return Outline(
        architecture="TestForCausalLM",
        dtype="float32",
        vocab_size=100,
        layer_prefix="model.layers.",
        blocks=[
            KindOutline(
                layers=of_kind,
                signature=f"graph of a {name} layer",
                inputs={"hidden_states": "hidden_states", "mask": f"layers.{of_kind[0]}.mask"},
                parameters=[NORM, QUERY, DOWN],
                cache_shape=[2, 4],
            )
            for name, of_kind in kinds.items()
            if of_kind
        ],
        first_outputs=[(0, "mask")],
        first_signature="graph of the embedding",
        first_parameters=["model.embed_tokens.weight"],
        last_signature="graph of the head",
        last_parameters=["model.norm.weight", "lm_head.weight"],
        head="lm_head.weight",
        parameters={
            name: ParameterOutline(dtype="float32", shape=shape, linear="proj" in name or "head" in name)
            for name, shape in sorted(shapes.items())
        },
    )


def spec(**sections: Any) -> BuildSpec:
    """A BuildSpec of two buckets. Sections given as mappings are laid over the usual ones."""
    usual: dict[str, Any] = {
        "name": "test",
        "model": {"model_id_or_path": "org/model", "seed_for_random_weight": 0},
        "target": {"name": "cpu"},
        "backend": {"name": "eager"},
        "buckets": {
            "prefill_buckets": [[1, 32]],
            "append_buckets": [],
            "decode_buckets": [[2, 64]],
            "max_seq_len_to_capture": 128,
            "paged_attention_num_blocks": 1024,
        },
        "quantization": {"scheme": "none", "rules": [{"match": "lm_head*", "scheme": "none"}]},
        "rewriting": {},
        "scheduler": {},
    }
    merged = {
        key: {**usual.get(key, {}), **value} if isinstance(value, Mapping) else value for key, value in sections.items()
    }
    return BuildSpec.model_validate({**usual, **merged})


def model_plan(of: BuildSpec | None = None, model: Outline | None = None, isa: str = "any") -> ModelPlan:
    """The model of `plan`."""
    model = model or outline()
    layers = sum(len(block.layers) for block in model.blocks)
    return plan_model(of or spec(), {"model_type": "test", "num_hidden_layers": layers}, model, isa)


def plan(of: BuildSpec | None = None, model: Outline | None = None, isa: str = "any") -> Plan:
    """The plan of `spec()` for `outline()`, unless others are given."""
    return make_plan({"": model_plan(of, model, isa)}, STEPS)


def kv_cache_bytes(of: Plan) -> int:
    """Bytes of the model's whole KV cache, of all ranks together."""
    layers = [layer for stage in of.model.stages for layer in stage]
    return kv_cache_bytes_of(of.model, of.kv_blocks.count, layers) * of.model.ranks
