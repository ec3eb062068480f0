from __future__ import annotations

import subprocess
import sys

import pytest
from quantized import FORMS

from furiosa_build.core.errors import UserError
from furiosa_build.quant.scheme import families, modules, names, scheme, summary, versions


@pytest.mark.parametrize("text", [*FORMS, "none", "int4", "int4-32", "int4-64-asymmetric-dynamic"])
def test_a_scheme_is_the_text_that_it_is_made_from(text: str) -> None:
    assert scheme(text).text == text


def test_equal_text_is_the_same_scheme_and_other_text_another() -> None:
    assert scheme("int8-plain") is scheme("int8-plain")
    assert len({scheme(text) for text in FORMS}) == len(set(FORMS)) == 12


def test_what_a_scheme_says_of_itself() -> None:
    found = scheme("int8-plain-tensor-dynamic")
    assert found.described == "int8 weights with one scale, activations rounded to int8 per token"
    assert found.rounds_activations
    assert scheme("fp8").described == "fp8 weights with a scale per channel, activations as they are"
    assert not scheme("fp8").rounds_activations


def test_the_families_that_recipes_may_name() -> None:
    assert names() == ["none", "fp8", "int4", "int8"]
    assert [family.family for family in families()] == names()


def test_an_unknown_scheme_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UserError, match="unknown quantization scheme 'fp9'") as error:
        scheme("fp9")
    assert error.value.valid == "none, fp8, int4, int8"
    assert error.value.hint == "did you mean 'fp8'?"
    with pytest.raises(UserError, match=r"'fp8-plain' is not a form of fp8: it has no \['plain'\]"):
        scheme("fp8-plain")


def test_a_step_runs_the_code_of_its_own_schemes_only() -> None:
    """So a change of another scheme does not make it run again."""
    assert modules(["fp8", "fp8-tensor"]) == ["furiosa_build.quant.fp8", "furiosa_build.quant.none"]
    assert modules([]) == ["furiosa_build.quant.none"]
    assert versions(["fp8", "int8-plain"]) == {}


def test_several_schemes_are_one_text() -> None:
    assert summary([]) == "none"
    assert summary(["int8", "int8"]) == "int8"
    assert summary(["int8", "fp8-dynamic", "int8"]) == "fp8-dynamic+int8"


def test_what_planning_asks_of_schemes_imports_no_torch() -> None:
    code = """
import sys
from furiosa_build.ir.tensors import Layout
from furiosa_build.quant.scheme import families, scheme
assert families()
assert scheme("int8").nbytes(Layout("bfloat16", (5, 6))) == 5 * 8 + 5 * 2 + 16
assert scheme("fp8-tensor-dynamic").layouts("a.weight", Layout("float32", (2, 3)))
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
