"""Whether a device holds an artifact, before it is built."""

from __future__ import annotations

from furiosa_build.core.system import Machine
from furiosa_build.plan.budget.preflight import Preflight
from furiosa_build.plan.budget.sizes import parameter_bytes
from furiosa_build.recipe.schema import BuildSpec

from .figures import (
    COMPILING,
    FP8,
    GB,
    figures,
    refused,
    remedies,
)
from .outlines import kv_cache_bytes, model_plan, plan, spec


def device(of: BuildSpec, **machine: int) -> Preflight:
    return figures(plan(of), machine=Machine(**{"cores": 2, "memory": 64 * GB, "available": 60 * GB, **machine}))


KV, PARAMETERS = kv_cache_bytes(plan()), parameter_bytes(model_plan())


def target(nbytes: int, **others: str) -> dict[str, object]:
    return {"name": "npu", "memory_gb": nbytes / GB, **others}


def test_a_target_holds_parameters_and_kv_cache() -> None:
    enough = device(spec(target=target(PARAMETERS + KV)))
    assert dict(enough.device.parts) == {"parameters": PARAMETERS, "KV cache": KV}
    assert (refused(enough), enough.device.fits, enough.device_is_host) == ({}, True, False)
    found = device(spec(target=target(PARAMETERS + KV - 1)))
    assert refused(found) == {"a device of target npu": (PARAMETERS + KV, PARAMETERS + KV - 1)}


def test_the_remedy_is_a_number_of_blocks_that_fits() -> None:
    short = PARAMETERS + KV * 769 // 1025  # a block more, for padding
    assert "paged_attention_num_blocks=768 or less (1024 now)" in remedies(device(spec(target=target(short))))
    better = spec(target=target(short), buckets={"paged_attention_num_blocks": 768})
    assert refused(device(better)) == {}


def test_where_not_one_sequence_fits_fewer_blocks_are_no_remedy() -> None:
    found = remedies(device(spec(target=target(PARAMETERS + KV // 100))))
    assert "num_blocks" not in found
    assert "decode_buckets" in found


def test_where_the_parameters_do_not_fit_smaller_ones_are_the_remedy() -> None:
    assert "quantization=fp8" in remedies(device(spec(target=target(PARAMETERS // 2))))
    assert "quantization" not in remedies(device(spec(target=target(PARAMETERS // 9), quantization=FP8)))


def test_this_machine_maps_the_parameters_so_the_kv_cache_has_to_fit() -> None:
    found = device(spec(), memory=KV)
    assert (found.device.available, found.device_is_host, found.device.fits) == (KV, True, False)
    assert refused(found) == {}
    assert refused(device(spec(), memory=KV - 1)) == {"this machine": (KV, KV - 1)}
    assert refused(device(spec(), memory=KV - 5, swap=5)) == {}


def test_of_another_machine_nothing_is_known() -> None:
    found = device(spec(target={"name": "x86-64-v3", "isa": "x86-64-v3"}), memory=1)
    assert (found.device.available, found.device.fits, refused(found)) == (None, True, {})


def test_a_target_that_says_how_much_it_has_is_believed() -> None:
    found = device(spec(target=target(GB, isa="native")), memory=1)
    assert (found.device.available, found.device_is_host, refused(found)) == (GB, False, {})


def test_an_artifact_that_is_not_to_be_made_is_not_refused() -> None:
    short = plan(spec(target=target(1)))
    assert refused(figures(short, steps=COMPILING)) == {}
    assert refused(figures(short, steps=["package"])) != {}
