"""A key is a function of all its factors."""

from __future__ import annotations

import json

import pytest

from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.plan import keys
from furiosa_build.plan.keys import ToolVersions, key_factors, key_of


def factors(**others: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "step": "test",
        "reads": {"a": 1},
        "inputs": {"fetch": {"f": "d1"}},
        "tools": {"torch": "2.13.0"},
        "source": {"a.py": "d3"},
    }
    return key_factors(**{**arguments, **others})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"step": "other"},
        {"reads": {"a": 2}},
        {"reads": {"a": 1, "b": None}},
        {"inputs": {"fetch": {"f": "d2"}}},
        {"inputs": {"quantize": {"f": "d1"}}},
        {"tools": {"torch": "2.13.1"}},
        {"source": {"a.py": "d4"}},
        {"source": {"b.py": "d3"}},
    ],
)
def test_every_factor_counts(change: dict[str, object]) -> None:
    assert key_of(factors(**change)) != key_of(factors())


def test_the_order_in_which_things_are_named_does_not_count() -> None:
    one = factors(reads={"a": 1, "b": 2}, source={"a.py": "d", "b.py": "e"})
    other = factors(reads={"b": 2, "a": 1}, source={"b.py": "e", "a.py": "d"})
    assert key_of(one) == key_of(other)


def test_factors_are_plain_data() -> None:
    assert json.loads(canonical_json(factors())) == factors()


def test_versions_are_those_that_are_installed() -> None:
    import pydantic

    assert ToolVersions().of(["pydantic"]) == {"pydantic": pydantic.VERSION}


def test_a_version_is_read_once_for_all_keys_of_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time is a parse of the package's METADATA."""
    read: list[str] = []
    monkeypatch.setattr(keys, "version", lambda package: read.append(package) or "1")
    versions = ToolVersions()
    assert [versions.of(["a", "b", "python"])["a"], versions.of(["b", "a"])["b"]] == ["1", "1"]
    assert versions.of_installed(["b", "c"]) == {"b": "1", "c": "1"}
    assert read == ["a", "b", "c"]


def test_of_optional_packages_those_that_are_installed() -> None:
    import pydantic

    assert ToolVersions().of_installed(["no-such-package", "pydantic"]) == {"pydantic": pydantic.VERSION}
