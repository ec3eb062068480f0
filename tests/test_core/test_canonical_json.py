"""The form of data whose digest counts. It lies here because the store's keys and digests are made of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_build.core.canonical_json import canonical_json, digest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
).filter(lambda value: "\\ud" not in json.dumps(value))  # Half a surrogate pair has no UTF-8.


def reversed_keys(value: Any) -> Any:
    """The same data, every mapping in the reverse order."""
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


@given(JSON)
def test_the_order_of_keys_does_not_count(value: Any) -> None:
    assert digest(reversed_keys(value)) == digest(value)


@given(JSON)
def test_nothing_is_lost(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value


@given(JSON, JSON)
def test_different_data_has_different_digests(one: Any, other: Any) -> None:
    assert (digest(one) == digest(other)) == (canonical_json(one) == canonical_json(other))


def test_form() -> None:
    assert canonical_json({"b": [1, 2.5, None, True], "a": "ö"}) == '{"a":"ö","b":[1,2.5,null,true]}'.encode()
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_floats_that_json_has_not_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)


def test_data_that_is_not_json_is_refused() -> None:
    with pytest.raises(TypeError):
        canonical_json({"path": {1, 2}})
