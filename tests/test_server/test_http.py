"""HTTP: methods, names in paths, compressed bodies."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable

import httpx
import pytest

from .asking import MAX_BODY_BYTES, TEXT, choices, text
from .process import Server


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/test", "/version", "/metrics", "/openapi.json"])
def test_head_is_get_without_the_body(running: Server, path: str) -> None:
    with running.http as http:
        got, head = http.get(path), http.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"") == (200, b"")
    assert head.headers["Content-Type" if got.content else "Content-Length"]
    assert head.headers.get("Content-Type") == got.headers.get("Content-Type")


def test_head_of_what_has_no_get(running: Server) -> None:
    with running.http as http:
        assert http.head("/v1/completions").status_code == 405
        assert http.head("/v1/none").status_code == 404


def test_a_model_by_its_name(running: Server) -> None:
    [model] = running.openai.models.list()
    assert running.openai.models.retrieve("test") == model
    with running.http as http:
        answer = http.get("/v1/models/some/other")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def raw_deflate(data: bytes) -> bytes:
    pack = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return pack.compress(data) + pack.flush()


PACKED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "members": ("gzip", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
    "zlib": ("deflate", zlib.compress),
    "raw": ("Deflate", raw_deflate),
    "not at all": ("identity", lambda data: data),
    "with a byte order mark": ("gzip", lambda data: gzip.compress(codecs.BOM_UTF8 + data)),
}


def send(server: Server, content: bytes, encoding: str) -> httpx.Response:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    with server.http as http:
        return http.post("/v1/completions", content=content, headers=headers)


@pytest.mark.parametrize("name", PACKED)
def test_compressed_bodies(running: Server, name: str) -> None:
    encoding, pack = PACKED[name]
    assert choices(send(running, pack(json.dumps(TEXT).encode()), encoding))[0]["text"] == text(running)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_what_comes_out_of_a_compressed_body_is_limited(running: Server, encoding: str) -> None:
    _, pack = PACKED["gzip" if encoding == "gzip" else "zlib"]
    body = json.dumps(TEXT).encode()
    assert send(running, pack(body + b" " * (MAX_BODY_BYTES - len(body))), encoding).status_code == 200
    answer = send(running, pack(body + b" " * (MAX_BODY_BYTES - len(body) + 1)), encoding)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    for broken in (body, pack(body)[:-1], pack(body)[:5], pack(body) + b"more"):
        answer = send(running, broken, encoding)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_content_encoding")


def test_other_compressions_are_refused(running: Server) -> None:
    answer = send(running, b"x", "br")
    assert (answer.status_code, answer.headers["Accept-Encoding"]) == (415, "gzip, deflate")
