"""What a server does besides generating: limits, keys, draining, metrics, the log."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from .process import Server, server

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


def test_one_id_twice_at_a_time(running: Server) -> None:
    """Whoever tries again may have the same id, while the first try goes on."""
    again = {"X-Request-Id": "again"}
    with (
        running.http as http,
        http.stream("POST", "/v1/completions", json=LONG | {"stream": True}, headers=again) as stream,
    ):
        next(stream.iter_lines())
        assert post(running, SHORT, **again).status_code == 200


def test_a_step_that_fails_ends_its_request_alone(running: Server) -> None:
    other = LONG | {"max_tokens": 300}
    expected = post(running, other).json()["choices"][0]["text"]
    broken = {"X-Request-Id": "broken"}
    with running.http as http, http.stream("POST", "/v1/completions", json=other | {"stream": True}) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        answer = post(running, SHORT | {"n": 2}, **broken)
        assert (answer.status_code, answer.headers["X-Request-Id"]) == (500, "broken")
        assert answer.json()["error"] == {
            "message": "internal server error",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
        # The first text has begun by then, so the stream has a status already.
        answer = post(running, SHORT | {"n": 2, "stream": True}, **broken)
        *_, event, end = answer.text.split("\n\n")
        assert (answer.status_code, end) == (200, "")
        assert json.loads(event.removeprefix("data: "))["error"]["code"] == "internal_error"
        texts = [json.loads(line[6:])["choices"][0]["text"] for line in [first, *lines] if line.startswith("data: {")]
    assert "".join(texts) == expected
    running.wait_until_idle()
    failed = running.wait_for("a text failed", request_id="broken")
    assert "Input/output error" in failed["exception"]
    assert running.wait_for("request", request_id="broken")["finish_reasons"] == ["error", "abort"]


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
    """A server with TLS, keys and narrow limits, of a file."""
    directory = tmp_path_factory.mktemp("guarded")
    certificate, key = make_certificate(directory)
    (directory / "keys").write_text(f"{KEY}\n")
    config = directory / "server.yaml"
    config.write_text(
        f"api_key_file: {directory / 'keys'}\n"
        "served_model_name: guarded\n"
        "max_body_bytes: 2000\nmax_prompt_tokens: 20\nmax_requests_in_flight: 1\nlog_prompts: true\n"
        "seed: 5\ntimeout_keep_alive: 1\n"
        "cors_origins: [https://here.example]\nroot_path: /below\n"
        f"ssl_certfile: {certificate}\nssl_keyfile: {key}\n"
    )
    with server(
        chat_artifact,
        "--server-config",
        str(config),
        "--served-model-name",
        "test",
        environment={"FURIOSA_API_KEYS": "of-the-environment"},
        certificate=certificate,
    ) as started:
        assert started.url.endswith("/below")
        started.url = started.url.removesuffix("/below")  # the proxy in front takes it away
        started.wait_for("ready")
        yield started


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """PEM files of a certificate that signs itself, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    pkcs8, no_password = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (directory / "certificate.pem").write_bytes(certificate.public_bytes(pem))
    (directory / "key.pem").write_bytes(key.private_bytes(pem, pkcs8, no_password))
    return directory / "certificate.pem", directory / "key.pem"


def test_tls(guarded: Server) -> None:
    assert guarded.url.startswith("https://")
    with guarded.http as http:  # knows the certificate
        assert http.get("/health").status_code == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{guarded.url}/health", trust_env=False)
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{guarded.url.replace('https', 'http')}/health", trust_env=False)


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


def test_idle_connections_are_closed(guarded: Server) -> None:
    """After a second here; by default after five."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(guarded.connect()) as connection:
        began = time.monotonic()
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert connection.recv(65536) == b""
        assert 1 <= time.monotonic() - began < 5


def test_the_servers_seed(guarded: Server) -> None:
    """Without a seed of its own, a request's text is the same for the same id."""
    body = LONG | {"temperature": 1, "max_tokens": 12}
    first, again, other = (post(guarded, body, KEY, **{"X-Request-Id": each}).json() for each in ("a", "a", "b"))
    assert first["choices"] == again["choices"] != other["choices"]


def test_cors(guarded: Server) -> None:
    asked = {"Origin": "https://here.example", "Access-Control-Request-Method": "POST"}
    with guarded.http as http:
        assert http.options("/v1/completions", headers=asked).headers["access-control-allow-origin"] == asked["Origin"]
        assert http.options("/v1/completions", headers=asked | {"Origin": "https://no.example"}).status_code == 400
