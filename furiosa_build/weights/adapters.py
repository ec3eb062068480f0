"""Adapters (LoRA and the like) in a model's directory: they change what it computes, and are not applied here."""

from __future__ import annotations

from pathlib import Path

from furiosa_build.core.errors import UserError
from furiosa_build.weights.hf_layout import read_json

ADAPTER_CONFIG = "adapter_config.json"
_ALONE = (
    'python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained('{name}').merge_and_unload().save_pretrained('MERGED')\""
)
_BESIDE = (
    "mkdir ADAPTER && mv '{name}'/adapter_* ADAPTER && "
    'python -c "from peft import PeftModel; from transformers import AutoModelForCausalLM as M; '
    "PeftModel.from_pretrained(M.from_pretrained('{name}'), 'ADAPTER').merge_and_unload()"
    ".save_pretrained('MERGED')\""
)
_MERGE = "merge it (pip install peft): {command}, copy the tokenizer's files to MERGED, and build that"


def check_no_adapter(directory: Path, hub_id: str | None = None) -> None:
    """Raises UserError for a directory with an adapter, which transformers with peft would apply to the model.

    Args:
        directory: The model's.
        hub_id: The model's on the hub, if the directory is one of the hub's cache.
    """
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        return
    fields = read_json(path)
    kind, base = fields.get("peft_type", "peft"), fields.get("base_model_name_or_path")
    if (directory / "config.json").is_file():
        what = f"the model's directory has an adapter ({kind}), which this version does not apply"
        # From the hub peft takes the base model that the adapter names, whatever else is there.
        hint = _merge(_ALONE, hub_id) if hub_id else _merge(_BESIDE, directory)
        hint += f"; to build the model without it, take a copy of its directory without {ADAPTER_CONFIG}"
    else:
        what = f"this is an adapter ({kind}) of {base!r} and not a model: this version does not apply adapters"
        hint = _merge(_ALONE, hub_id or directory)
    raise UserError(what, where=hub_id or str(path), valid="a whole model", hint=hint)


def _merge(command: str, name: str | Path) -> str:
    return _MERGE.format(command=command.format(name=name))
