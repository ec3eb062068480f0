"""HTTP as uvicorn implements it; but invalid HTTP gets an error response in OpenAI's shape too."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import MutableMapping
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from furiosa_build.server.http.errors import ApiError, bad_request, timed_out

_ABORT = "furiosa_build.abort"


def abort(scope: MutableMapping[str, Any]) -> None:
    """Closes a request's connection at once; what the client has not read yet is lost."""
    scope["state"][_ABORT]()


class Connection(H11Protocol):
    """A client's connection.

    Attributes:
        head_timeout_s: Seconds that a request's head may take to come, from the connection's or the head's beginning.
    """

    head_timeout_s: ClassVar[float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app_state = {**self.app_state, _ABORT: lambda: self.transport.abort()}
        self._head_limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unlimit_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._unlimit_head()
        elif self._head_limit is None:
            self._limit_head()

    def eof_received(self) -> None:
        """The client has sent all that it will. What is incomplete then is answered; uvicorn would only hang up."""
        waits_for_more = self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]
        if waits_for_more and not self.transport.is_closing():
            self.conn.receive_data(b"")
            self.handle_events()

    def send_400_response(self, msg: str) -> None:
        """Called where h11 refuses what came."""
        if self.cycle is not None and not self.cycle.response_complete:
            # The application waits for the rest of a body; there is nobody left to answer.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._answer(bad_request(f"{msg} {sys.exception()}", code="invalid_http"))
        # Else an answer has begun already.
        self.transport.close()

    def _limit_head(self) -> None:
        self._head_limit = self.loop.call_later(self.head_timeout_s, self._end_head)

    def _unlimit_head(self) -> None:
        if self._head_limit is not None:
            self._head_limit.cancel()
            self._head_limit = None

    def _end_head(self) -> None:
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._answer(timed_out(self.head_timeout_s))
        self.transport.close()

    def _answer(self, error: ApiError) -> None:
        """Responds without the application, as there is no request."""
        response = error.response()
        headers = [*response.raw_headers, (b"Connection", b"close")]
        for event in (
            h11.Response(status_code=error.status_code, headers=headers),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")


def connection(head_timeout_s: float) -> type[Connection]:
    """The class of connections with this limit, for uvicorn to make them of."""
    return type("Connection", (Connection,), {"head_timeout_s": head_timeout_s})
