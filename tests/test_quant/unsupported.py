"""Configs of checkpoints that are refused: how each differs from one that is not, and what the message says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Edit = Callable[[dict[str, Any]], object]


def of_group(**changes: Any) -> Edit:
    return lambda config: config["config_groups"]["group_0"].update(changes)


def of_weights(**changes: Any) -> Edit:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(changes)


def of_inputs(**changes: Any) -> Edit:
    return lambda config: config["config_groups"]["group_0"]["input_activations"].update(changes)


def of_all(**changes: Any) -> Edit:
    return lambda config: config.update(changes)


def second_group(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A group like the first but for the changes of its weights."""
    group: dict[str, Any] = json.loads(json.dumps(config["config_groups"]["group_0"]))
    group["weights"].update(changes)
    config["config_groups"]["group_1"] = group
    return group


REFUSED: dict[str, tuple[Edit, str]] = {
    "gptq": (of_all(quant_method="gptq"), "quant_method=gptq"),
    "fp8 of another kind": (of_all(quant_method="fp8"), "quant_method=fp8"),
    "no method": (lambda config: config.pop("quant_method"), "quant_method=null"),
    "not compressed": (of_all(quantization_status="calibration"), "quantization_status=calibration"),
    "kv cache": (of_all(kv_cache_scheme={"num_bits": 8}), 'kv_cache_scheme={"num_bits": 8}'),
    "transform": (of_all(transform_config={"config_groups": {"a": 1}}), "transform_config="),
    "sparsity": (of_all(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config="),
    "no groups": (of_all(config_groups={}), "config_groups={}"),
    "groups are a list": (of_all(config_groups=[1]), "config_groups=[1]"),
    "a preset": (of_all(config_groups={"FP8": ["Linear"]}), 'config_groups.FP8=["Linear"]'),
    "format": (of_group(format="nvfp4-pack-quantized"), "config_groups.group_0.format=nvfp4-pack-quantized"),
    "format of all": (lambda config: (of_group(format=None)(config), of_all(format="dense")(config)), "format=dense"),
    "format is a list": (of_group(format=[]), "config_groups.group_0.format=[]"),
    "format of another type": (of_group(format="int-quantized"), "weights.type=float"),
    "no weights": (of_group(weights=None), "group_0.weights=null"),
    "4 bits": (of_weights(num_bits=4), "weights.num_bits=4"),
    "bits are a text": (of_weights(num_bits="8"), "weights.num_bits=8"),
    "groups of columns": (of_weights(strategy="group", group_size=128), "weights.strategy=group"),
    "blocks": (of_weights(strategy="block", block_structure=[128, 128]), "weights.strategy=block"),
    "zero points": (of_weights(symmetric=False), "weights.symmetric=false"),
    "dynamic weights": (of_weights(dynamic=True), "weights.dynamic=true"),
    "outputs": (of_group(output_activations={"num_bits": 8}), "group_0.output_activations="),
    "static scales": (of_inputs(dynamic=False, strategy="tensor"), "input_activations.dynamic=false"),
    "one scale for all tokens": (of_inputs(strategy="tensor"), "input_activations.strategy=tensor"),
    "activations of another type": (of_inputs(type="int"), "input_activations.type=int"),
    "asymmetric activations": (of_inputs(symmetric=False), "input_activations.symmetric=false"),
    "activations of 4 bits": (of_inputs(num_bits=4), "input_activations.num_bits=4"),
    "a class": (of_group(targets=["LlamaMLP"]), "group_0.targets=LlamaMLP"),
    "no pattern": (of_group(targets=["re:("]), "group_0.targets=re:("),
    "targets are a text": (of_group(targets="Linear"), "group_0.targets=Linear"),
    "ignore is a number": (of_all(ignore=3), "ignore=3"),
    "ignore has no pattern": (of_all(ignore=["re:["]), "ignore=re:["),
    "lookahead": (of_group(targets=["re:(?!lm_head).*"]), "group_0.targets=re:(?!lm_head).*"),
    "mixed without formats": (
        lambda config: (of_group(format=None)(config), of_all(format="mixed-precision")(config)),
        "format=mixed-precision",
    ),
    "a second group": (lambda config: second_group(config, num_bits=4), "config_groups.group_1.weights.num_bits=4"),
}
