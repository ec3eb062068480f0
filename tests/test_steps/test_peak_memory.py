from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .peak_of_step import CASES

pytestmark = [
    pytest.mark.grid,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells private memory from mapped files"),
]


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """By step, quantization and source: MiB at the peak with 2 layers and with 16, of 10 MiB each."""
    script = Path(__file__).with_name("peak_of_step.py")
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("peaks"))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize("case", [" ".join(case) for case in CASES])
def test_private_memory_does_not_grow_with_depth(case: str, peaks: dict[str, list[float]]) -> None:
    """Holding the weights of 14 more layers would take 140 MiB, quantized 35; what is kept of the rest is names."""
    few, many = peaks[case]
    assert many - few < 20
