"""Embeddings, scores and reranking, asked by OpenAI's own client and compared with transformers' hidden states."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from .conftest import MODEL as DIRECTORY
from .process import Server

MODEL = "test"
TEXTS = ["It was a bright cold day", "She said", "It was a dark and stormy night"]
TOLERANCE = 0.02
"""The model is bfloat16; its embeddings have the norm 1."""


def tokens_of(server: Server, text: str) -> list[int]:
    with server.http as http:
        return http.post("/tokenize", json={"prompt": text}).json()["tokens"]


@pytest.fixture(scope="module")
def expected(running: Server) -> np.ndarray:
    """Transformers' last hidden state of the last token of each text, normalized."""
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).base_model
    with torch.inference_mode():
        states = [model(torch.tensor([tokens_of(running, text)])).last_hidden_state[0, -1] for text in TEXTS]
    return torch.nn.functional.normalize(torch.stack(states), dim=1).numpy()


def post(server: Server, path: str, **fields: Any) -> Any:
    with server.http as http:
        return http.post(path, json=fields)


def test_openais_client_gets_embeddings(running: Server, expected: np.ndarray) -> None:
    ids = [tokens_of(running, text) for text in TEXTS]
    client = running.openai.embeddings
    for given, rows in ((TEXTS, 3), (ids, 3), (TEXTS[0], 1), (ids[0], 1)):
        for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            done = client.create(model=MODEL, input=given, **options)  # type: ignore[arg-type]
            assert [each.index for each in done.data] == list(range(rows))
            found = [
                np.frombuffer(base64.b64decode(each.embedding), dtype="<f4")
                if isinstance(each.embedding, str)
                else np.array(each.embedding)
                for each in done.data
            ]
            np.testing.assert_allclose(np.stack(found), expected[:rows], atol=TOLERANCE)
            assert done.usage.prompt_tokens == done.usage.total_tokens == sum(map(len, ids[:rows]))


def test_vllms_additions(running: Server, expected: np.ndarray) -> None:
    raw = post(running, "/v1/embeddings", input=TEXTS[0], normalize=False).json()["data"][0]["embedding"]
    assert np.linalg.norm(raw) > 1.5
    np.testing.assert_allclose(np.array(raw) / np.linalg.norm(raw), expected[0], atol=TOLERANCE)
    ids = tokens_of(running, TEXTS[0])
    short = post(running, "/v1/embeddings", input=[TEXTS[0]], truncate_prompt_tokens=2).json()
    last = post(running, "/v1/embeddings", input=[ids[-2:]]).json()
    assert short["data"] == last["data"]
    assert short["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores(running: Server, expected: np.ndarray, path: str) -> None:
    cosines = expected @ expected.T
    one = post(running, path, model=MODEL, text_1=TEXTS[0], text_2=TEXTS).json()
    assert [each["score"] for each in one["data"]] == pytest.approx(cosines[0], abs=TOLERANCE)
    pairs = post(running, path, text_1=TEXTS, text_2=TEXTS[::-1]).json()
    assert [each["score"] for each in pairs["data"]] == pytest.approx(np.diag(cosines[:, ::-1]), abs=TOLERANCE)
    single = post(running, path, queries=TEXTS[1], documents=TEXTS[2]).json()
    assert [each["score"] for each in single["data"]] == pytest.approx([cosines[1, 2]], abs=TOLERANCE)
    refused = post(running, path, text_1=TEXTS[:2], text_2=TEXTS)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "text_1")


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_reranking(running: Server, expected: np.ndarray, path: str) -> None:
    cosines = expected @ expected[0]
    order = [int(index) for index in np.argsort(-cosines)]
    documents: list[Any] = [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]
    done = post(running, path, model=MODEL, query=TEXTS[0], documents=documents).json()
    assert [each["index"] for each in done["results"]] == order
    assert order[0] == 0
    assert [each["relevance_score"] for each in done["results"]] == pytest.approx(cosines[order], abs=TOLERANCE)
    assert [each["document"]["text"] for each in done["results"]] == [TEXTS[index] for index in order]
    best = post(running, path, query=TEXTS[0], documents=TEXTS, top_n=1, return_documents=False).json()
    assert [set(each) for each in best["results"]] == [{"index", "relevance_score"}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": [5] * 2000}, "input"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"messages": []}, "input"),
    ],
)
def test_what_is_refused(running: Server, fields: dict[str, Any], param: str) -> None:
    refused = post(running, "/v1/embeddings", model=MODEL, **fields)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].startswith(param)


def test_an_artifact_without_hidden_states_names_the_key(last_only: Server) -> None:
    with pytest.raises(openai.BadRequestError, match=r"model\.output_last_hidden_state=true"):
        last_only.openai.embeddings.create(model=MODEL, input="a")
    for path, fields in (
        ("/score", {"text_1": "a", "text_2": "b"}),
        ("/rerank", {"query": "a", "documents": ["b"]}),
    ):
        refused = post(last_only, path, **fields)
        assert refused.status_code == 400
        assert "model.output_last_hidden_state=true" in refused.json()["error"]["message"]
