from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from furiosa_build.backends.inductor import InductorBackend
from furiosa_build.errors import UserError
from furiosa_build.steps.pool import Pool

from .small_graph import Small, inputs, small_graph


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One graph compiled twice, as a build compiles: by a worker process, each time into an empty scratch directory.

    Together they take about half a minute on an idle machine, so it is done once for all tests here.
    """
    root = tmp_path_factory.mktemp("inductor")
    graph = root / "graph.json"
    graph.write_bytes(small_graph().to_json())
    isa = InductorBackend().isa("native")
    programs, pool = [], Pool(1)
    try:
        # Of different lengths, so that a path that is only overwritten in place would show as well.
        for name in ("one", "another-directory-with-a-longer-name"):
            output = root / name / "output"
            output.mkdir(parents=True)
            scratch = root / name / "scratch"
            request = {"graph": str(graph), "backend": "inductor", "isa": isa, "scratch": str(scratch)}
            pool.run("compile:test", "compile", request, output, root / f"{name}.log")
            programs.append(output / "program.so")
    finally:
        pool.close()
    return programs


@pytest.mark.parametrize("slots", [11, 40])
def test_a_program_gives_the_numbers_of_the_function_and_writes_the_cache(programs: list[Path], slots: int) -> None:
    given, expected_inputs = inputs(slots), inputs(slots)
    (expected,) = Small()(*expected_inputs)
    (found,) = InductorBackend().load(programs[0]).run(given)
    # float32 sums of 16 numbers near 1, in another order and with fused multiply-add: a few units of 2**-24.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert given[1].equal(expected_inputs[1])


def test_two_compiles_in_different_directories_give_the_same_bytes(programs: list[Path]) -> None:
    assert programs[0].read_bytes() == programs[1].read_bytes()


def test_no_path_of_the_build_is_in_the_program(programs: list[Path]) -> None:
    content = programs[0].read_bytes()
    assert content[:4] == b"\x7fELF"
    for path in (programs[0].parents[2], Path.home(), Path(torch.__file__).parent, Path(__file__).parents[2]):
        assert os.fsencode(path) not in content, path
    assert b"scratch" not in content


def test_the_program_is_all_that_is_left_and_may_be_read_by_everyone(programs: list[Path]) -> None:
    assert [path.name for path in programs[0].parent.iterdir()] == ["program.so"]
    assert stat.S_IMODE(programs[0].stat().st_mode) == 0o644
    assert list((programs[0].parents[1] / "scratch").glob("program-*")) == []


def test_a_program_that_is_no_library_is_refused_at_load(tmp_path: Path) -> None:
    program = tmp_path / "program.so"
    program.write_bytes(b"\x7fELF and no more")
    with pytest.raises(RuntimeError, match=r"program\.so"):
        InductorBackend().load(program)


def test_a_missing_compiler_is_one_message_with_both_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    for attempt in (
        InductorBackend().check_toolchain,
        lambda: InductorBackend().compile(small_graph(), tmp_path / "program.so", "x86-64-v3", tmp_path / "scratch"),
    ):
        with pytest.raises(UserError) as error:
            attempt()
        assert "no-such-compiler" in error.value.what
        assert "install g++" in str(error.value.hint)
        assert "backend=eager" in str(error.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_the_compiler_is_part_of_what_determines_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "fake-compiler"
    fake.write_text("#!/bin/sh\necho fake compiler 99.1\necho more\n")
    fake.chmod(0o755)
    assert "fake" not in InductorBackend().key_factors()["c++"]
    monkeypatch.setenv("CXX", str(fake))
    assert InductorBackend().key_factors()["c++"] == "fake compiler 99.1"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert InductorBackend().key_factors()["c++"] == "none"


@pytest.mark.parametrize("host", ["x86-64-v2", "other"])
def test_an_instruction_set_without_programs_is_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("furiosa_build.backends.inductor.host_isa", lambda: host)
    backend = InductorBackend()
    with pytest.raises(UserError, match=host) as error:
        backend.isa("native")
    assert error.value.where == "target.isa"
    assert error.value.valid == "x86-64-v3, x86-64-v4"
    assert backend.isa("x86-64-v4") == "x86-64-v4", "to compile for another machine is no mistake"


def test_native_is_the_host_s_own_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("furiosa_build.backends.inductor.host_isa", lambda: "x86-64-v3")
    assert InductorBackend().isa("native") == "x86-64-v3"
