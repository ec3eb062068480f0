"""What the backend refuses before anything of the library runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_build.backends import cpu
from furiosa_build.backends.native.backend import NativeBackend
from furiosa_build.backends.target import Target
from furiosa_build.core.errors import UserError


def test_a_machine_that_lacks_an_instruction_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "host_isa", lambda: "x86-64-v2")
    with pytest.raises(UserError) as error:
        NativeBackend().check_host(Target("x86-64-v3", "any"), "artifact.json")
    assert error.value.what == "the artifact's programs need instruction set 'x86-64-v3', this is 'x86-64-v2'"
    with pytest.raises(UserError, match="backend native makes no programs for instruction set 'x86-64-v2'"):
        NativeBackend().isa("native")
    with pytest.raises(ValueError, match="the library needs instruction set x86-64-v3, this machine has x86-64-v2"):
        NativeBackend().load(tmp_path / "any.plan", library=tmp_path / "libkernels.so")


def test_a_compiler_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    NativeBackend().check_toolchain()
    compiler = tmp_path / "old-compiler"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo old 9.1 && exit\necho \"error: unknown '-mamx-tile'\" >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(UserError) as error:
        NativeBackend().check_toolchain()
    assert error.value.what.startswith("backend native needs a C++ compiler with -march=x86-64-v4")
    assert error.value.what.endswith("-mamx-bf16: error: unknown '-mamx-tile'")
    assert error.value.hint == "install g++ 11 or newer, or build with backend=eager"
