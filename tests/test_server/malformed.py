"""Requests that no server can take, drawn from a seed."""

from __future__ import annotations

import json
import random
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

MAX_BODY_BYTES = 20_000
"""Of the server that is asked."""

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "test", "prompt": "It was a", "max_tokens": 2, "temperature": 0},
    "/v1/chat/completions": {"model": "test", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
    "/generate": {"text": "It was a", "sampling_params": {"max_completion_tokens": 2}},
    "/v1/embeddings": {"model": "test", "input": ["It was a", "She said"]},
    "/score": {"model": "test", "text_1": "It was a", "text_2": ["She said"]},
    "/rerank": {"model": "test", "query": "It was a", "documents": ["She said"]},
    "/tokenize": {"prompt": "It was a"},
    "/detokenize": {"tokens": [1, 2, 3]},
}
JSON_TYPE = "application/json"


class Malformed(NamedTuple):
    """What is sent, byte by byte; `ends`: and then that nothing more will come."""

    kind: str
    data: bytes
    ends: bool = False


def requests(number: int, seed: int) -> Iterator[Malformed]:
    """`number` of them, all kinds in turn."""
    chance = random.Random(seed)
    kinds = list(KINDS.items())
    for index in range(number):
        kind, make = kinds[index % len(kinds)]
        made = make(chance)
        yield Malformed(kind, made) if isinstance(made, bytes) else Malformed(kind, made[0], ends=True)


def http(
    path: str,
    body: bytes,
    *,
    method: str = "POST",
    content_type: str | None = JSON_TYPE,
    length: object = None,
    **headers: str,
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: here", f"Content-Length: {len(body) if length is None else length}"]
    if content_type is not None:
        lines.append(f"Content-Type: {content_type}")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def valid(chance: random.Random) -> tuple[str, dict[str, Any]]:
    path = chance.choice(list(ROUTES))
    return path, json.loads(json.dumps(ROUTES[path]))


def text(chance: random.Random) -> tuple[str, bytes]:
    path, body = valid(chance)
    return path, json.dumps(body).encode()


def bad_json(chance: random.Random) -> bytes:
    path, body = text(chance)
    return http(
        path,
        chance.choice(
            [
                b"",
                b"{",
                b"null",
                b"[]",
                b'"text"',
                b"{}}",
                b"{'model': 'test'}",
                body[: chance.randrange(len(body))],
                body + b",",
                b"\x00" + body,
                body.replace(b'": ', b'"; ', 1),
                body.replace(b'"', b"", 1),
                b"{// no comment\n" + body[1:],
                body[:-1] + b",}",
                body[:-1] + b', "user": 01}',
                body[:-1] + b', "user": "\x00"}',
                chance.randbytes(chance.randrange(1, 200)),
            ]
        ),
    )


def wrong_type(chance: random.Random) -> bytes:
    path, body = valid(chance)
    where: Any = body
    key = chance.choice(list(where))
    if key == "sampling_params":
        where = where[key]
        key = "max_completion_tokens"
    wrong = [{}, True, [[]], {"a": 1}, [None], -1.5, [{}], ["", 1]]
    where[key] = chance.choice(wrong)
    return http(path, json.dumps(body).encode())


def unknown_field(chance: random.Random) -> bytes:
    path, body = valid(chance)
    name = "".join(chance.choices("abcdefgh\u00e9\u4e2d\U0001f600", k=chance.randrange(1, 30)))
    return http(path, json.dumps(body | {name: 1}, ensure_ascii=chance.random() < 0.5).encode())


def huge_number(chance: random.Random) -> bytes:
    path = chance.choice(["/v1/completions", "/v1/chat/completions", "/generate", "/detokenize"])
    number = chance.choice([b"9" * chance.choice([20, 400, 5000]), b"1e999", b"-1e999", b"-" + b"9" * 30, b"1e15"])
    if path == "/generate":
        return http(path, b'{"text": "x", "sampling_params": {"top_p": %b}}' % number)
    if path == "/detokenize":
        return http(path, b'{"tokens": [%b]}' % number)
    field = chance.choice([b"n", b"temperature", b"top_p", b"min_p", b"presence_penalty"])
    return http(path, json.dumps(ROUTES[path]).encode()[:-1] + b', "%b": %b}' % (field, number.replace(b"1e15", b"-7")))


def not_a_number(chance: random.Random) -> bytes:
    path, body = text(chance)
    return http(path, body[:-1] + b', "user": %b}' % chance.choice([b"NaN", b"Infinity", b"-Infinity", b"nan", b"+1"]))


def deep(chance: random.Random) -> bytes:
    depth = chance.choice([200, 900, 5000])
    opening, closing = chance.choice([(b"[", b"]"), (b'{"a":', b"}")])
    nested = opening * depth + b"1" + closing * (depth if chance.random() < 0.7 else 0)
    path = chance.choice(["/v1/completions", "/v1/chat/completions"])
    field = chance.choice([b"response_format", b"prompt", b"tools", b"stop"])
    return http(path, json.dumps(ROUTES[path]).encode()[:-1] + b', "%b": %b}' % (field, nested))


def twice(chance: random.Random) -> bytes:
    path, body = text(chance)
    name = next(iter(ROUTES[path]))
    return http(path, body[:-1] + b', "%b": %b}' % (name.encode(), json.dumps(ROUTES[path][name]).encode()))


def encoding(chance: random.Random) -> bytes:
    path, body = text(chance)
    words = body.decode()
    return http(
        path,
        chance.choice(
            [
                words.encode("utf-16"),
                words.encode("utf-32"),
                2 * BOM_UTF8 + body,
                words.encode("utf-16-be"),
                body[:-1] + b', "user": "\xff\xfe"}',
                body[:-1] + b', "user": "\xc3"}',
                body[:-1] + b', "user": "\xed\xa0\x80"}',
                body[:-1] + "\u00e9".encode("latin-1") + b"}",
                body.translate(bytes(range(128, 256)) * 2),
            ]
        ),
    )


def surrogate(chance: random.Random) -> bytes:
    path, body = text(chance)
    half = chance.choice([b"\\ud800", b"\\udfff", b"\\ud83d\\u0041", b"\\udc00\\ud800"])
    return http(path, body[:-1] + chance.choice([b', "user": "a%bz"}', b', "%b": 1}', b', "stop": ["%b"]}']) % half)


def oversized(chance: random.Random) -> bytes | tuple[bytes]:
    path, body = text(chance)
    body = body[:-1] + b" " * MAX_BODY_BYTES + b"}"
    good = chunked(path, body, chance.randrange(1000, 9000))
    return chance.choice([http(path, body), good, (good + b"and no chunk",), (good[:-5] + b"no chunk",)])


def content_type(chance: random.Random) -> bytes:
    path, body = text(chance)
    kinds = [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "x",
        "/",
        ";",
        "application/jsonx",
        "application/",
        "application/xml",
        "\xff",
        JSON_TYPE + "x; charset=utf-8",
    ]
    return http(path, body, content_type=chance.choice(kinds))


def method(chance: random.Random) -> bytes:
    path, body = text(chance)
    return http(path, body, method=chance.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO", "post"]))


def path(chance: random.Random) -> bytes:
    _, body = text(chance)
    return http(
        chance.choice(
            [
                "/",
                "//",
                "/v1",
                "/v1/completion",
                "/v1/completions/../../etc/passwd",
                "/%00",
                "/%ff%fe",
                "/v2/completions",
                "*",
                "http://elsewhere/v1/completions",
                "/" + "x" * 8000,
                "/v1/completions%20",
                "/tokenize/" + "../" * 50,
            ]
        ),
        body,
    )


def head(chance: random.Random) -> bytes:
    """No HTTP at all, or a head that is none."""
    path, body = text(chance)
    good = http(path, body)
    return chance.choice(
        [
            good.replace(b"HTTP/1.1", b"HTTX/1.1"),
            good.replace(b" HTTP/1.1", b""),
            good.replace(b"Host: here\r\n", b""),
            good.replace(b"Host: here", b"Host here"),
            good.replace(b"Host: here", b"Host: he\x00re"),
            good.replace(b"Host: here", b"Ho\xffst: here"),
            good.replace(b"Host: here", b"X: " + b"y" * 70_000)[:60_000],
            good.replace(b"POST ", b"PO ST "),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
            b"\r\n\r\n{}\r\n\r\n",
            good.replace(b"Host: here", b"Host: here\r\nHost: there"),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            good.replace(path.encode(), path.encode() + b"\x00"),
        ]
    )


def bad_length(chance: random.Random) -> bytes | tuple[bytes]:
    path, body = text(chance)
    length = chance.choice(
        ["x", "-1", "1.5", "0x10", "1e3", "9" * 30, f"{len(body)}, {len(body) + 1}", "", "more", "less"]
    )
    if length == "more":
        return (http(path, body, length=len(body) + chance.randrange(1, 900)),)
    if length == "less":
        return (http(path, body, length=len(body) - 1),)
    return http(path, body, length=length)


def chunked(path: str, body: bytes, most: int) -> bytes:
    """A good one, in chunks of that many bytes."""
    parts = [body[begin : begin + most] for begin in range(0, len(body), most)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return _chunked_head(path) + chunks + b"0\r\n\r\n"


def _chunked_head(path: str) -> bytes:
    return http(path, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")


def bad_chunks(chance: random.Random) -> bytes | tuple[bytes]:
    path, body = text(chance)
    good = chunked(path, body, len(body))
    size = b"%x\r\n" % len(body)
    return chance.choice(
        [
            (good[:-5],),  # no end
            (good[:-9],),  # not all of a chunk
            (_chunked_head(path),),
            _chunked_head(path) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body) - 1, body),
            (_chunked_head(path) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body) + 90, body),),
            good.replace(size, b"zz\r\n"),
            good.replace(size, b"-5\r\n"),
            good.replace(size, b"f" * 30 + b"\r\n"),
            (http(path, body, **{"Transfer-Encoding": "chunked"}),),
            good.replace(b"chunked", b"gzip"),
            good.replace(b"chunked", b"gzip, chunked"),
            good.replace(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
        ]
    )


KINDS: dict[str, Callable[[random.Random], bytes | tuple[bytes]]] = {
    each.__name__: each  # type: ignore[misc]
    for each in (
        bad_json,
        wrong_type,
        unknown_field,
        huge_number,
        not_a_number,
        deep,
        twice,
        encoding,
        surrogate,
        oversized,
        content_type,
        method,
        path,
        head,
        bad_length,
        bad_chunks,
    )
}
