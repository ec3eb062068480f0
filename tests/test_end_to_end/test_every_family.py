"""docs/models.md says of every family of transformers whether it is built, and why not: each is tried."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from grid import grid

ROOT = Path(__file__).resolve().parents[2]


def benchmark() -> ModuleType:
    """`benchmarks/families.py`, which makes the table."""
    spec = importlib.util.spec_from_file_location("families", ROOT / "benchmarks" / "families.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module
    spec.loader.exec_module(module)
    return module


FAMILIES = benchmark()
ROWS = {
    match[1]: match[0] for match in re.finditer(r"^\| `(\S+)` \|.*$", FAMILIES.DOCUMENT.read_text(), flags=re.MULTILINE)
}


def test_the_page_has_every_family() -> None:
    assert list(ROWS) == list(FAMILIES.families())
    assert {row.split(" | ")[2] for row in ROWS.values()} == {"equal", "refused"}


@pytest.mark.parametrize("model_type", grid(FAMILIES.families(), ["bloom", "doge", "llama4_text"]))
def test_what_the_page_says_of_a_family_is_so(model_type: str, tmp_path: Path) -> None:
    assert FAMILIES.judge(model_type, tmp_path).row == ROWS[model_type]
