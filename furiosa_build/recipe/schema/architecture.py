"""The fields of a model's config.json that a build needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError

from furiosa_build.core.errors import UserError
from furiosa_build.recipe.schema.section import invalid

if TYPE_CHECKING:
    from furiosa_build.recipe.schema.spec import BuildSpec


_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_LENGTH = "max_position_embeddings"
"""Of some models that is not bounded, and some leave it to the default of their class."""


def check_architecture(spec: BuildSpec, architecture: Mapping[str, Any], where: str) -> None:
    """Check that a model's `config.json` has what a build needs and that the spec asks for no more than that.

    BuildSpec does this by itself for `model.architecture`; this is for a config.json that was read later.

    Args:
        spec: What is to be built.
        architecture: The fields of config.json.
        where: The file, for the message.
    """
    if misfit := architecture_error(spec, architecture):
        context = misfit.context or {}
        raise UserError(context["what"], where=where, valid=context["valid"])


def architecture_error(spec: BuildSpec, architecture: Mapping[str, Any]) -> PydanticCustomError | None:
    """The first thing that is wrong with an architecture, or that a spec asks for and it does not have."""

    def wrong(name: str, valid: str) -> PydanticCustomError:
        found = f"{name}={architecture[name]!r} is not valid" if name in architecture else f"has no {name}"
        return invalid(f"the model's architecture: {found}", key=("model", "architecture", name), valid=valid)

    model_type, classes = architecture.get("model_type"), architecture.get("architectures")
    if not (isinstance(model_type, str) and model_type):
        return wrong("model_type", "a string such as llama")
    if not (isinstance(classes, list | tuple) and classes and all(isinstance(name, str) for name in classes)):
        return wrong("architectures", "a list of class names such as [LlamaForCausalLM]")
    for name in (*_SIZES, *([_LENGTH] if _LENGTH in architecture else [])):
        if type(architecture.get(name)) is not int or architecture[name] < 1:
            return wrong(name, "a whole number of at least 1")

    layers, length = architecture["num_hidden_layers"], architecture.get(_LENGTH)
    if (asked := spec.model.num_hidden_layers) is not None and asked > layers:
        what = f"num_hidden_layers={asked} is more than the model's own {layers} layers"
        return invalid(what, key=("model", "num_hidden_layers"), valid=f"1 to {layers}")
    is_given = "max_seq_len_to_capture" in spec.buckets.model_fields_set  # else it adapts: `recipe.lengths`
    if is_given and length is not None and (asked := spec.buckets.max_seq_len_to_capture) > length:
        what = f"max_seq_len_to_capture={asked} is more than the model's max_position_embeddings={length}"
        return invalid(what, key=("buckets", "max_seq_len_to_capture"), valid=f"1 to {length}")
    return None
