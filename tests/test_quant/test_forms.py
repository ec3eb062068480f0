from __future__ import annotations

import pytest
from quantized import FORMS

from furiosa_build.quant.forms import Form


@pytest.mark.parametrize("text", FORMS)
def test_a_form_is_the_text_that_it_is_made_from(text: str) -> None:
    assert str(Form.parse(text)) == text


def test_every_text_is_another_form() -> None:
    assert len({Form.parse(text) for text in FORMS}) == len(set(FORMS)) == 12


def test_what_a_form_says() -> None:
    form = Form.parse("int8-plain-tensor-dynamic")
    assert form == Form("int8", plain=True, tensor=True, dynamic=True)
    assert form.described == "int8 weights with one scale, activations rounded to int8 per token"
    assert Form.parse("fp8").described == "fp8 weights with a scale per channel, activations as they are"
    assert [text for text in ("fp8", "int8", "int8-plain") if Form.parse(text).is_packed] == ["int8"]
