"""A Hugging Face hub on this machine: what huggingface_hub asks of one to find a model and fetch its files.

Files of weights are kept elsewhere, as on the hub: a request for one is redirected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


class Asked(NamedTuple):
    """A request that was answered: its method and path, how many bytes were sent, and whether a range was asked for."""

    method: str
    path: str
    sent: int
    is_part: bool


@dataclass
class FakeHub:
    """What the hub has, and what it has been asked.

    Attributes:
        models: The files of each commit, by the model's name.
        revisions: The commits that names stand for: (model, revision) -> commit.
        token: What a request for a file must have, if it is set. Anyone may list files.
        is_granted: Whether the one who has the token may read them.
        failing: The status that it answers everything with, if it is set.
        cuts: Files whose next transfer ends after so many bytes.
        asked: All requests so far.
    """

    url: str = ""
    models: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    revisions: dict[tuple[str, str], str] = field(default_factory=dict)
    token: str | None = None
    is_granted: bool = True
    failing: int | None = None
    cuts: dict[str, int] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def put(self, name: str, directory: Path, revision: str = "main") -> str:
        """Adds a commit with the files of a directory, which the revision stands for from now on."""
        files = {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.models.setdefault(name, {})[commit] = files
        self.revisions[name, revision] = self.revisions[name, commit] = commit
        return commit

    def sent(self, name: str) -> list[int]:
        """How many bytes of a file were sent, transfer by transfer."""
        return [asked.sent for asked in self._transfers(name)]

    def sent_whole(self, name: str) -> list[int]:
        """Those of transfers of the whole file."""
        return [asked.sent for asked in self._transfers(name) if not asked.is_part and asked.sent]

    def _transfers(self, name: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.path.endswith(f"/{name}") and asked.method == "GET"]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that answers while the context lasts."""
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def use(hub: FakeHub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """From now on it is the hub of this process and of those that it starts, with an own cache."""
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for name, value in environment(hub, cache).items():
        patch.setenv(name, value)
    patch.delenv("HF_TOKEN", raising=False)


def environment(hub: FakeHub, cache: Path) -> dict[str, str]:
    """The variables that make it the hub of a process."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache.parent / "hf"),
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.state
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_api, is_elsewhere = parts[0] == "api", parts[0] == "elsewhere"
        if is_api or is_elsewhere:
            parts = parts[2:] if is_api else parts[1:]
        name, rest = "/".join(parts[:2]), parts[2:]
        if hub.failing is not None:
            return self._refuse(hub.failing, "", "it is tired")
        if name not in hub.models:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        commit = hub.revisions.get((name, rest[1]))
        if commit is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
        files = hub.models[name][commit]
        if rest[0] == "revision":
            return self._answer({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]})
        if rest[0] == "tree":
            return self._answer([_entry(file, content) for file, content in files.items()])
        if hub.token is not None and self.headers["Authorization"] != f"Bearer {hub.token}" and not is_elsewhere:
            return self._refuse(401, "GatedRepo", "Access to it is restricted")
        if not hub.is_granted:
            return self._refuse(403, "GatedRepo", "Access to it is restricted")
        file = "/".join(rest[2:])
        if file not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        return self._send(name, commit, file, files[file], is_elsewhere)

    def _send(self, name: str, commit: str, file: str, content: bytes, is_elsewhere: bool) -> None:
        headers = {"ETag": f'"{_etag(file, content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if _is_large(file) and not is_elsewhere:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": headers["ETag"]}
            headers["Location"] = f"{self.state.url}/elsewhere/{name}/resolve/{commit}/{file}"
            return self._respond(302, headers, b"")
        status = 200
        if asked := self.headers["Range"]:
            first, last = asked.removeprefix("bytes=").split("-")
            total, end = len(content), int(last) + 1 if last else len(content)
            content, status = content[int(first) : end], 206
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(content) - 1}/{total}"
        return self._respond(status, headers, content, self.state.cuts.pop(file, None) if self._gets else None)

    @property
    def _gets(self) -> bool:
        return self.command == "GET"

    def _answer(self, data: Any) -> None:
        self._respond(200, {"Content-Type": "application/json"}, json.dumps(data).encode())

    def _refuse(self, status: int, code: str, message: str, more: dict[str, str] | None = None) -> None:
        self._respond(status, {"X-Error-Code": code, "X-Error-Message": message, **(more or {})}, b"")

    def _respond(self, status: int, headers: dict[str, str], content: bytes, cut: int | None = None) -> None:
        body = content[:cut] if self._gets else b""
        self.state.asked.append(Asked(self.command, urlsplit(self.path).path, len(body), "Range" in self.headers))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection |= cut is not None

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _is_large(file: str) -> bool:
    return file.endswith(".safetensors")


def _etag(file: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if _is_large(file) else hashlib.sha1(content).hexdigest()


def _entry(file: str, content: bytes) -> dict[str, Any]:
    """A file in the list of a commit's files."""
    lfs = {"oid": _etag(file, content), "size": len(content), "pointerSize": 130}
    found = {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    return {**found, "lfs": lfs} if _is_large(file) else found
