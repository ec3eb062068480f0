"""What a server does besides generating: limits, keys, draining, metrics, the log."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from .process import PATIENCE_S, Server, server

LONG = {"model": "test", "prompt": "It was a", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
SHORT = LONG | {"max_tokens": 3}
KEY = "k" * 20


def post(server: Server, body: object, key: str | None = None, **headers: str) -> httpx.Response:
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    with server.http as http:
        return http.post("/v1/completions", json=body, headers=headers)


def test_a_client_that_leaves_ends_its_request(running: Server) -> None:
    aborted = running.metric("furiosa_requests_finished_total")
    with running.http as http, http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
        lines = stream.iter_lines()  # closes the connection when it is dropped
        next(lines)
        assert running.metric("furiosa_kv_blocks_used") > 0
    running.wait_until_idle()
    assert running.metric("furiosa_requests_finished_total") == aborted + 1
    line = running.wait_for("request", path="/v1/completions", finish_reasons=["abort"])
    assert line["generated_tokens"] < 900


def test_one_that_waits_for_the_whole_text_may_leave_too(running: Server) -> None:
    with running.http as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=LONG, timeout=0.3)
    running.wait_until_idle()
    line = running.wait_for("request", status=499)
    assert line["finish_reasons"] == ["abort"]


def test_request_ids_and_the_log(running: Server) -> None:
    answer = post(running, SHORT | {"prompt": "a secret"}, **{"X-Request-Id": "mine-1"})
    assert answer.headers["X-Request-Id"] == "mine-1"
    line = running.wait_for("request", request_id="mine-1")
    assert (line["status"], line["generated_tokens"], line["finish_reasons"]) == (200, 3, ["length"])
    assert (line["method"], line["path"]) == ("POST", "/v1/completions")
    assert 0 < line["first_token_s"] <= line["duration_s"]
    assert "secret" not in str(line)
    assert post(running, SHORT, **{"X-Request-Id": "not fit\tfor a log"}).headers["X-Request-Id"].isalnum()


def test_metrics_count(running: Server) -> None:
    names = (
        "furiosa_generated_tokens_total",
        "furiosa_requests_finished_total",
        "furiosa_time_to_first_token_seconds_count",
        "furiosa_time_per_output_token_seconds_count",
        "furiosa_queue_seconds_count",
    )
    before = [running.metric(name) for name in names]
    post(running, SHORT)
    assert [running.metric(name) for name in names] == [
        count + by for count, by in zip(before, (3, 1, 1, 1, 1), strict=True)
    ]
    assert running.metric("furiosa_kv_blocks") > 0


@pytest.fixture(scope="module")
def guarded(chat_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys and narrow limits, of a file."""
    directory = tmp_path_factory.mktemp("guarded")
    (directory / "keys").write_text(f"{KEY}\n")
    config = directory / "server.yaml"
    config.write_text(
        f"api_key_file: {directory / 'keys'}\n"
        "served_model_name: guarded\n"
        "max_body_bytes: 2000\nmax_prompt_tokens: 20\nmax_requests_in_flight: 1\nlog_prompts: true\n"
        "cors_origins: [https://here.example]\nroot_path: /below\n"
    )
    with server(
        chat_artifact,
        "--server-config",
        str(config),
        "--served-model-name",
        "test",
        environment={"FURIOSA_API_KEYS": "of-the-environment"},
    ) as started:
        assert started.url.endswith("/below")
        started.url = started.url.removesuffix("/below")  # the proxy in front takes it away
        started.wait_for("ready")
        yield started


def test_keys(guarded: Server) -> None:
    assert post(guarded, SHORT, KEY).status_code == 200
    assert post(guarded, SHORT, "of-the-environment").status_code == 200
    for key in (None, "x", KEY[:-1], KEY + "k", KEY.upper()):
        answer = post(guarded, SHORT, key)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    with guarded.http as http:
        assert http.get("/health").status_code == 200
        assert http.get("/metrics").status_code == 401


def test_limits_of_size(guarded: Server) -> None:
    assert post(guarded, SHORT | {"prompt": "x" * 2000}, KEY).status_code == 413
    with guarded.http as http:  # in chunks, so that the size is not known beforehand
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        answer = http.post("/v1/completions", content=iter([b'{"', b"x" * 2000]), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    answer = post(guarded, SHORT | {"prompt": [1] * 21}, KEY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "prompt_too_long")


def test_too_many_are_sent_away(guarded: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    with (
        guarded.http as http,
        http.stream("POST", "/v1/completions", json=LONG | {"stream": True}, headers=headers) as s,
    ):
        lines = s.iter_lines()
        next(lines)
        answer = post(guarded, SHORT, KEY)
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) > 0
    guarded.wait_for("request", finish_reasons=["abort"])
    assert post(guarded, SHORT, KEY).status_code == 200


def test_prompts_are_logged_if_asked_for(guarded: Server) -> None:
    post(guarded, SHORT | {"prompt": "not a secret"}, KEY, **{"X-Request-Id": "told"})
    assert guarded.wait_for("request", request_id="told")["prompts"] == ["not a secret"]


def test_cors(guarded: Server) -> None:
    asked = {"Origin": "https://here.example", "Access-Control-Request-Method": "POST"}
    with guarded.http as http:
        assert http.options("/v1/completions", headers=asked).headers["access-control-allow-origin"] == asked["Origin"]
        assert http.options("/v1/completions", headers=asked | {"Origin": "https://no.example"}).status_code == 400


def test_sigterm_lets_requests_end(chat_artifact: Path) -> None:
    with server(chat_artifact) as started:
        with started.http as http:  # it listens before the model is loaded
            assert http.get("/health").status_code in (200, 503)
        started.wait_for("ready")
        with started.http as http, http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            started.process.send_signal(signal.SIGTERM)
            started.wait_for("draining")
            with started.http as other:
                assert other.get("/health").status_code == 503
                answer = other.post("/v1/completions", json=SHORT)
                assert answer.status_code == 503
                assert int(answer.headers["Retry-After"]) > 0
            assert list(lines)[-2] == "data: [DONE]"
        assert started.process.wait(PATIENCE_S) == 0


def test_sigterm_cuts_at_the_stated_time(chat_artifact: Path) -> None:
    with server(chat_artifact, "--drain-timeout-s", "0") as started:
        started.wait_for("ready")
        with started.http as http, http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            started.process.send_signal(signal.SIGTERM)
            assert "shutting down" in list(lines)[-2]
        assert started.process.wait(PATIENCE_S) == 0
