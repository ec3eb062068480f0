"""A place in a checkpoint's `quantization_config`: reads values, and refuses what is not supported by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from furiosa_build.core.errors import UserError


class Refuser:
    """Makes the messages about one file. Keys are relative to `prefix`, a dotted place in its quantization_config."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path, self._prefix = path, prefix

    def only(self, key: str, value: Any, *valid: Any, hint: str = "") -> None:
        """Raises UserError unless `value` is one of `valid`, of the same type."""
        if not any(value == one and type(value) is type(one) for one in valid):
            raise self.refusal(key, value, " or ".join(_shown(one) for one in valid), hint)

    def refusal(self, key: str, value: Any, valid: str, hint: str = "") -> UserError:
        """The error for a value that is not supported."""
        shown, at = _shown(value), self.at(key)
        what = f"this version does not take a checkpoint with {at}={shown if len(shown) < 80 else shown[:80] + ' ...'}"
        return UserError(what, where=f"{self.path}, quantization_config.{at}", valid=valid, hint=hint)

    def at(self, key: str) -> str:
        """The dotted place of a key in the quantization_config."""
        return f"{self._prefix}.{key}" if self._prefix else key


class ConfigGroup(Refuser):
    """One of the `config_groups`: layers that are quantized alike.

    Attributes:
        format: The format that its tensors have.
    """

    def __init__(self, path: Path, name: str, group: Mapping[str, Any], format_: str) -> None:
        super().__init__(path, f"config_groups.{name}")
        self._group, self.format = group, format_

    def get(self, key: str) -> Any:
        """A value of the group; None where it has none."""
        return self._group.get(key)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A mapping of the group. Raises UserError where it is something else."""
        value = self._group.get(key)
        if not isinstance(value, dict):
            raise self.refusal(key, value, "a mapping")
        return value

    @property
    def num_bits(self) -> Any:
        """Bits of a weight's numbers."""
        return self.mapping("weights").get("num_bits", 8)

    def rounds_activations(self, kind: str) -> bool:
        """Whether layers round their input to 8-bit numbers of a kind, `int` or `float`, with a scale for each token.

        Raises UserError where they round otherwise.
        """
        if self.get("input_activations") is None:
            return False
        inputs = self.mapping("input_activations")
        self.only("input_activations.num_bits", inputs.get("num_bits", 8), 8)
        self.only("input_activations.type", inputs.get("type", "int"), kind)
        self.only("input_activations.dynamic", inputs.get("dynamic", False), True)
        self.only("input_activations.symmetric", inputs.get("symmetric", True), True)
        self.only("input_activations.scale_dtype", inputs.get("scale_dtype"), None)
        hint = "with one scale for all tokens, what a request gets would depend on the others in its batch"
        self.only("input_activations.strategy", inputs.get("strategy"), "token", hint=hint)
        return True


def _shown(value: Any) -> str:
    """A value as JSON has it; a string without its quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def rounded_activations(kind: str) -> dict[str, Any]:
    """`input_activations` of a group for which `rounds_activations` is true."""
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
