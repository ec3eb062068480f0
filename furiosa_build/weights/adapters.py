"""Adapters (LoRA and the like) in a model's directory: they change what it computes, and are not applied here."""

from __future__ import annotations

from pathlib import Path

from furiosa_build.core.errors import UserError
from furiosa_build.weights.hf_layout import read_json

ADAPTER_CONFIG = "adapter_config.json"
_MERGE = "merge it (with peft: AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW))"


def check_no_adapter(directory: Path) -> None:
    """Raises UserError for a directory with an adapter, which transformers with peft would apply to the model."""
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        return
    fields = read_json(path)
    kind, base = fields.get("peft_type", "peft"), fields.get("base_model_name_or_path")
    if (directory / "config.json").is_file():
        what = f"the model's directory has an adapter ({kind}), which this version does not apply"
        hint = f"{_MERGE}, or move {ADAPTER_CONFIG} away to build the model without it"
    else:
        what = (
            f"this directory is an adapter ({kind}) of {base!r} and not a model: this version does not apply adapters"
        )
        hint = f"{_MERGE}, and name the directory of the merged model"
    raise UserError(what, where=str(path), valid="a whole model", hint=hint)
