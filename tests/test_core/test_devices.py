from __future__ import annotations

import pytest

from furiosa_build.core.devices import DeviceError, elements, kind_of


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ("cpu", ["cpu:0"]),
        ("cpu:0, cpu:3", ["cpu:0", "cpu:3"]),
        ("cuda:1", ["cuda:1"]),
        ("npu:0:2", ["npu:0:2"]),
        ("npu:1:0-1", ["npu:1:0", "npu:1:1"]),
        ("npu:0", ["npu:0:0", "npu:0:1", "npu:0:2", "npu:0:3"]),
        ("npu:0:*", ["npu:0:0", "npu:0:1", "npu:0:2", "npu:0:3"]),
        ("npu:0:3,npu:1:0-1", ["npu:0:3", "npu:1:0", "npu:1:1"]),
    ],
)
def test_elements(devices: str, expected: list[str]) -> None:
    assert elements(devices, of_npu=4) == expected
    assert kind_of(devices) == expected[0].partition(":")[0]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("", "the device '' is not well formed"),
        ("gpu:0", "'gpu:0' is not well formed"),
        ("cuda", "'cuda' is not well formed"),
        ("npu", "'npu' is not well formed"),
        ("npu:0:", "'npu:0:' is not well formed"),
        ("npu:0:1-", "is not well formed"),
        ("cpu,", "'' is not well formed"),
        ("npu:0:4", "'npu:0:4' is not there"),
        ("npu:0:3-1", "'npu:0:3-1' is not there"),
        ("npu:0:*,npu:0:1", "names npu:0:1 twice"),
        ("cpu,cpu:0", "names cpu:0 twice"),
        ("cpu,npu:0:0", "mixes cpu and npu"),
    ],
)
def test_what_is_no_list_of_devices(devices: str, message: str) -> None:
    with pytest.raises(DeviceError, match=message.replace("*", r"\*")) as refused:
        elements(devices, of_npu=4)
    assert refused.value.valid
