from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_build.backends.eager import EagerBackend
from furiosa_build.backends.registry import get_backend
from furiosa_build.core.errors import UserError

from .small_graph import Small, inputs, small_graph


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.json"
    EagerBackend().compile(small_graph(), path, "any", tmp_path / "scratch")
    return path


@pytest.mark.parametrize("slots", [11, 40])
def test_a_program_gives_the_numbers_of_the_function_and_writes_the_cache(program: Path, slots: int) -> None:
    given, expected_inputs = inputs(slots), inputs(slots)
    (expected,) = Small()(*expected_inputs)
    (found,) = EagerBackend().load(program).run(given)
    assert found.equal(expected)
    assert given[1].equal(expected_inputs[1])
    assert not given[1].equal(inputs(slots)[1])


def test_a_program_is_the_graph_and_leaves_nothing_else_behind(program: Path) -> None:
    assert program.read_bytes() == small_graph().to_json()
    assert [path.name for path in program.parent.iterdir()] == ["program.json"]


def test_a_program_runs_anywhere() -> None:
    backend = get_backend("eager")
    assert isinstance(backend, EagerBackend)
    assert {backend.isa(requested) for requested in ("native", "x86-64-v3", "x86-64-v4")} == {"any"}
    assert backend.key_factors() == {}
    backend.check_toolchain()
    with pytest.raises(UserError, match="no programs for instruction set 'x86-64-v5'"):
        backend.isa("x86-64-v5")


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", b"{}", b'{"nodes":[]}'])
def test_a_damaged_program_is_refused_at_load(program: Path, damage: bytes) -> None:
    program.write_bytes(damage)
    with pytest.raises(ValueError, match="GraphData"):
        EagerBackend().load(program)


def test_a_program_that_is_cut_short_is_refused_at_load(program: Path) -> None:
    program.write_bytes(program.read_bytes()[:-7])
    with pytest.raises(ValueError, match="GraphData"):
        EagerBackend().load(program)


def test_an_unknown_backend_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(UserError) as error:
        get_backend("inductr")
    assert error.value.where == "backend.name"
    assert error.value.valid == "eager, inductor, native"
    assert "inductor" in str(error.value.hint)
