"""HTTP itself, as uvicorn has it, but what is no HTTP is answered in OpenAI's shape too."""

from __future__ import annotations

import json
import sys
from collections.abc import MutableMapping
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from furiosa_build.server.errors import bad_request

_ABORT = "furiosa_build.abort"


def abort(scope: MutableMapping[str, Any]) -> None:
    """Ends a request's connection at once; what the client has not read yet is dropped."""
    scope["state"][_ABORT]()


class Connection(H11Protocol):
    """A client's connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app_state = {**self.app_state, _ABORT: lambda: self.transport.abort()}

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
            body = json.dumps(bad_request(f"{msg} {sys.exception()}", code="invalid_http").content).encode()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            for event in (
                h11.Response(status_code=400, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        # Else an answer has begun already.
        self.transport.close()
