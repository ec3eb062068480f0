"""The server against its own description, /openapi.json, with requests that schemathesis makes of it."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi import checks

from .process import Server

EXAMPLES = 20
"""Of each route that takes a body, and of each kind."""

POSTS = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/score",
    "/rerank",
    "/generate",
    "/tokenize",
    "/detokenize",
]
GETS = ["/v1/models", "/v1/models/{name}", "/health", "/version", "/metrics", "/tokenizer_info"]

CONFORM = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]


@pytest.fixture(scope="module")
def description(running: Server) -> dict[str, Any]:
    with running.http as http:
        return dict(http.get("/openapi.json").json())


@pytest.fixture(scope="module")
def schema(description: dict[str, Any]) -> BaseSchema:
    return schemathesis.openapi.from_dict(description)


@pytest.fixture(scope="module")
def narrow(description: dict[str, Any]) -> BaseSchema:
    """The description, narrowed to what ends soon and is about the model that there is."""
    narrowed = copy.deepcopy(description)
    models = narrowed["components"]["schemas"]
    limited_ones = (
        "CompletionRequest",
        "ChatRequest",
        "ResponsesRequest",
        "SharkSampling",
        "EmbeddingRequest",
        "ScoreRequest",
        "RerankRequest",
        "TokenizeRequest",
        "DetokenizeRequest",
    )
    for name in limited_ones:
        for field, limited in {
            "model": {"const": "test"},
            "n": {"type": "integer", "minimum": 1, "maximum": 2},
            "max_tokens": {"type": "integer", "minimum": 1, "maximum": 3},
            "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 3},
            "max_output_tokens": {"type": "integer", "minimum": 1, "maximum": 3},
        }.items():
            if field in models[name]["properties"]:
                models[name]["properties"][field] = limited
                models[name].setdefault("required", []).append(field)
    # One of prompt and messages is given, which a schema of fields does not say.
    models["TokenizeRequest"]["properties"] |= {"prompt": {"type": "string"}, "messages": {"type": "null"}}
    models["TokenizeRequest"].setdefault("required", []).append("prompt")
    [name] = narrowed["paths"]["/v1/models/{name}"]["get"]["parameters"]
    name["schema"] = {"const": "test"}
    return schemathesis.openapi.from_dict(narrowed)


def test_errors_are_described(description: dict[str, Any]) -> None:
    assert set(description["paths"]) == {*POSTS, *GETS}
    assert description["components"]["schemas"]["Error"]["required"] == ["message", "type", "param", "code"]
    for path in POSTS:
        answers = description["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "408", "413", "500", "503"} <= set(answers)
        assert "422" not in answers  # FastAPI's own, which nobody is sent
        assert ("429" in answers) == (path not in ("/tokenize", "/detokenize"))
        for status, answer in answers.items():
            if status != "200":
                shape = answer["content"]["application/json"]["schema"]
                assert shape == {"$ref": "#/components/schemas/ErrorBody"}
            assert ("Retry-After" in answer.get("headers", {})) == (status in ("429", "503"))


def ask(running: Server, schema: BaseSchema, path: str, mode: GenerationMode, checked: list[Any]) -> list[int]:
    """The statuses of answers to requests made by the description, or by breaking it."""
    operation = schema[path]["POST" if path in POSTS else "GET"]
    statuses = []
    with requests.Session() as session:
        session.trust_env = False
        # Making a request may take longer than the server keeps a connection open.
        session.headers["Connection"] = "close"

        @hypothesis.seed(5)
        @hypothesis.settings(
            max_examples=EXAMPLES if path in POSTS else 1,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def each(case: Case) -> None:
            answer = case.call_and_validate(base_url=running.url, session=session, checks=checked)
            statuses.append(answer.status_code)

        each()
    return statuses


@pytest.mark.parametrize("path", [*POSTS, *GETS])
def test_requests_as_described_are_answered_as_described(running: Server, narrow: BaseSchema, path: str) -> None:
    statuses = ask(running, narrow, path, GenerationMode.POSITIVE, CONFORM)
    assert 200 in statuses


@pytest.mark.parametrize("path", POSTS)
def test_others_are_refused_as_described(running: Server, schema: BaseSchema, path: str) -> None:
    statuses = ask(running, schema, path, GenerationMode.NEGATIVE, [*CONFORM, checks.negative_data_rejection])
    assert 400 in statuses
