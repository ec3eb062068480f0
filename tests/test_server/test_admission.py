"""A request is admitted before any work is done for it, and that work leaves the event loop free."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from furiosa_build.server.app import create_app
from furiosa_build.server.http import json_route
from furiosa_build.server.options import ServerOptions
from furiosa_build.server.service import Service

PATIENCE_S = 30
HUGE = "word " * 500_000
CHAT = {"model": "test", "messages": [{"role": "user", "content": HUGE}]}
BODIES: dict[str, Any] = {
    "/tokenize": {"prompt": HUGE},
    "/detokenize": {"tokens": [1] * 1_000_000},
    "/generate": {"text": HUGE},
    "/v1/completions": {"model": "test", "prompt": HUGE},
    "/v1/chat/completions": CHAT,
}


class HeldTokenizer:
    """Works until it is told to go on, and says when it has begun."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()

    def _hold(self, what: str) -> None:
        self.calls.append(what)
        self.has_begun.set()
        assert self.may_go_on.wait(PATIENCE_S)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        del text, add_special_tokens
        self._hold("encode")
        return [1, 2]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        del ids, skip_special_tokens
        self._hold("decode")
        return "text"

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        del messages
        self._hold("template")
        return "text"


def with_server(
    tokenizer: HeldTokenizer, use: Callable[[httpx.AsyncClient], Awaitable[None]], max_requests_in_flight: int = 1
) -> None:
    """Runs `use` with a client of a server in this process, whose engine tokenizes and does nothing else."""
    config = SimpleNamespace(max_seq_len_to_capture=64)
    artifact = SimpleNamespace(
        metadata=SimpleNamespace(name="test"),
        model_metadata=SimpleNamespace(vocab_size=256),
        generator_config=config,
    )

    async def run() -> None:
        service = Service(ServerOptions(max_requests_in_flight=max_requests_in_flight, max_body_bytes=2**30))
        service.start(SimpleNamespace(tokenizer=tokenizer, artifact=artifact, is_dead=False))  # type: ignore[arg-type]
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            await use(http)

    asyncio.run(run())


async def begun(tokenizer: HeldTokenizer, request: Awaitable[httpx.Response]) -> asyncio.Future[httpx.Response]:
    """The request, when the tokenizer works for it."""
    asked = asyncio.ensure_future(request)
    assert await asyncio.to_thread(tokenizer.has_begun.wait, PATIENCE_S)
    assert not asked.done()
    return asked


@pytest.mark.parametrize(
    ("path", "body", "call"),
    [
        ("/tokenize", {"prompt": "x"}, "encode"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}]}, "template"),
        ("/detokenize", {"tokens": [1]}, "decode"),
    ],
)
def test_the_loop_is_free_while_the_tokenizer_works(path: str, body: Any, call: str) -> None:
    tokenizer = HeldTokenizer()

    async def use(http: httpx.AsyncClient) -> None:
        asked = await begun(tokenizer, http.post(path, json=body))
        assert (await http.get("/health")).status_code == 200
        assert not asked.done()
        tokenizer.may_go_on.set()
        assert (await asked).status_code == 200

    with_server(tokenizer, use)
    assert tokenizer.calls[0] == call


def test_with_the_limit_reached_nothing_is_tokenized() -> None:
    tokenizer = HeldTokenizer()

    async def use(http: httpx.AsyncClient) -> None:
        asked = await begun(tokenizer, http.post("/tokenize", json={"prompt": "x"}))
        for path, body in BODIES.items():
            answer = await http.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded"), path
            assert int(answer.headers["Retry-After"]) > 0
        assert tokenizer.calls == ["encode"]
        tokenizer.may_go_on.set()
        assert (await asked).status_code == 200
        assert (await http.post("/tokenize", json={"prompt": "x"})).status_code == 200

    with_server(tokenizer, use)


def test_with_the_limit_reached_no_body_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a large one decoded in the event loop."""
    threads = []
    decode = json_route.jiter.from_json

    def watched(*arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return decode(*arguments, **options)

    monkeypatch.setattr(json_route.jiter, "from_json", watched)
    tokenizer = HeldTokenizer()

    async def use(http: httpx.AsyncClient) -> None:
        asked = await begun(tokenizer, http.post("/tokenize", json={"prompt": HUGE}))
        for path in BODIES:
            body = "[" * 1_000_000  # which is not even JSON
            answer = await http.post(path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 429, path
        tokenizer.may_go_on.set()
        assert (await asked).status_code == 200

    with_server(tokenizer, use)
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


@pytest.mark.parametrize(
    ("body", "status"), [("[", 400), (json.dumps({"prompt": 1}), 400), (json.dumps({"prompt": "x"}), 200)]
)
def test_whoever_is_answered_is_not_in_flight_any_more(body: str, status: int) -> None:
    tokenizer = HeldTokenizer()
    tokenizer.may_go_on.set()

    async def use(http: httpx.AsyncClient) -> None:
        for _ in range(3):
            answer = await http.post("/tokenize", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == status

    with_server(tokenizer, use)
