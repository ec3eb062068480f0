"""Bodies that a client has compressed: gzip and deflate, as RFC 9110 has them."""

from __future__ import annotations

import zlib

from furiosa_build.server.http.errors import ApiError, bad_request

_WINDOW = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


def body_too_large(max_bytes: int) -> ApiError:
    """The error 413."""
    return ApiError(413, f"the body has more than {max_bytes} bytes", code="body_too_large")


def decoded(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """A body without its content encoding.

    Args:
        body: The body as it came.
        encoding: Its `Content-Encoding`.
        max_bytes: The most bytes that may come out; no more are made.

    Raises:
        ApiError: The encoding is another one (415), the body is not in it (400), or is larger (413).
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOW:
        headers = {"Accept-Encoding": "gzip, deflate"}
        raise ApiError(415, f"the content encoding {encoding!r} is not gzip or deflate", headers=headers)
    try:
        return _decompress(body, _WINDOW[encoding], max_bytes)
    except zlib.error as error:
        if encoding == "deflate":  # many send it without zlib's head and sum
            try:
                return _decompress(body, -zlib.MAX_WBITS, max_bytes)
            except zlib.error:
                pass
        raise bad_request(f"the body is not {encoding}: {error}", code="invalid_content_encoding") from error


def _decompress(body: bytes, window: int, max_bytes: int) -> bytes:
    content = bytearray()
    while body or not content:  # gzip may come in several members
        stream = zlib.decompressobj(window)
        content += stream.decompress(body, max_bytes + 1 - len(content))
        if len(content) > max_bytes:
            raise body_too_large(max_bytes)
        if not stream.eof:
            raise zlib.error("its end is missing")
        body = stream.unused_data
    return bytes(content)
