"""What the tests of the artifact share."""

from __future__ import annotations

from pathlib import Path

import pytest

from .sound import PARAMETERS, PROGRAM, safetensors, seal, tensor


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "artifact"
    for name in ("params", "programs", "model"):
        (root / name).mkdir(parents=True)
    (root / PARAMETERS).write_bytes(safetensors({"__metadata__": {"a": "b"}, "weight": tensor()}))
    (root / PROGRAM).write_bytes(b"machine code")
    (root / "model" / "config.json").write_text("{}")
    seal(root)
    return root
