"""provenance.json, read by the types that in-toto publishes. They refuse fields that the specifications do not have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage
from user_directory import UserDirectory, make_built_directory, steps_in_this_process

import furiosa_build


@pytest.fixture(autouse=True, scope="module")
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    return make_built_directory(tmp_path_factory.mktemp("provenance"))


@pytest.fixture(scope="module")
def artifact(built: UserDirectory) -> Path:
    return (built.artifacts / "latest").resolve()


@pytest.fixture(scope="module")
def statement(artifact: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((artifact / "provenance.json").read_bytes())
    return data


@pytest.fixture(scope="module")
def predicate(statement: dict[str, Any]) -> provenance_pb2.Provenance:
    return ParseDict(statement["predicate"], provenance_pb2.Provenance())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_is_a_valid_statement(statement: dict[str, Any]) -> None:
    message = ParseDict(statement, StatementMessage())
    Statement.copy_from_pb(message).validate()
    assert message.predicate_type == "https://slsa.dev/provenance/v1"


def test_the_subjects_are_the_files_as_they_are(statement: dict[str, Any], artifact: Path) -> None:
    message = ParseDict(statement, StatementMessage())
    without = {"provenance.json", "manifest.json", "timestamp.json"}
    files = {path.relative_to(artifact).as_posix(): sha256(path) for path in artifact.rglob("*") if path.is_file()}
    assert {subject.name: subject.digest["sha256"] for subject in message.subject} == {
        name: digest for name, digest in files.items() if name not in without
    }


def test_the_definition_has_the_recipe_and_the_inputs(
    predicate: provenance_pb2.Provenance, built: UserDirectory
) -> None:
    definition = predicate.build_definition
    assert definition.build_type == "urn:furiosa-build:recipe:v1"
    recipe = definition.external_parameters["recipe"]
    assert recipe["name"] == "tiny"
    assert recipe["buckets"]["max_seq_len_to_capture"] == 64
    assert {found.name: found.digest["sha256"] for found in definition.resolved_dependencies} == {
        path.name: sha256(path) for path in (built.root / "tiny").iterdir() if path.name != "config.json"
    }
    # Of config.json the fields count, not the bytes.
    config = json.loads((built.root / "tiny" / "config.json").read_bytes())
    assert dict(definition.internal_parameters["hf_config"]).keys() == config.keys()


def test_the_builder_has_the_versions_that_are_installed(predicate: provenance_pb2.Provenance) -> None:
    builder = predicate.run_details.builder
    assert builder.id == "urn:furiosa-build"
    for package in ("torch", "transformers", "numpy", "safetensors"):
        assert builder.version[package] == version(package)
    assert builder.version["furiosa_build"] == furiosa_build.__version__
    [source] = builder.builder_dependencies
    assert len(source.digest["sha256"]) == 64


def test_nothing_of_this_machine_is_in_it(artifact: Path, built: UserDirectory) -> None:
    """No path, no user, no time."""
    text = (artifact / "provenance.json").read_text()
    assert str(built.root) not in text
    assert str(Path.home()) not in text
    assert "startedOn" not in text
    assert "invocationId" not in text
