"""The part of GitHub that the nightly workflow talks to, on loopback: REST API, artifacts, and a webhook."""

from __future__ import annotations

import io
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

REPOSITORY, TOKEN = "owner/suite", "secret"


@dataclass
class GitHub:
    """What the server knows: runners, jobs by run, artifacts, issues with their comments, and what a webhook got."""

    address: str = ""
    runners: list[dict[str, Any]] = field(default_factory=list)
    jobs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    contents: dict[int, bytes] = field(default_factory=dict)
    issues: list[dict[str, Any]] = field(default_factory=list)
    comments: dict[int, list[str]] = field(default_factory=dict)
    begun: dict[str, str] = field(default_factory=dict)
    locked: set[int] = field(default_factory=set)
    cancelled: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    refuses: bool = False  #: answers every request of the API with an error

    @property
    def environment(self) -> dict[str, str]:
        """What a workflow's environment says of it."""
        return {
            "GITHUB_API_URL": self.address, "GITHUB_REPOSITORY": REPOSITORY, "GITHUB_TOKEN": TOKEN,
            "GITHUB_REF_NAME": "main",
        }  # fmt: skip

    def keep(self, name: str, folder: Path, created_at: str) -> None:
        """Upload the files of a folder as an artifact."""
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(folder))
        number = len(self.artifacts) + 1
        run = {"head_repository_id": 1, "repository_id": 1, "head_branch": "main"}
        known = {"id": number, "name": name, "expired": False, "created_at": created_at, "workflow_run": run}
        self.artifacts.append(known)
        self.contents[number] = content.getvalue()

    def answer(self, method: str, path: str, query: dict[str, str], content: Any) -> tuple[int, Any]:
        """The status and the answer to a request; a text is the address of a redirection."""
        page, size = int(query.get("page", 1)), int(query.get("per_page", 30))
        part = slice((page - 1) * size, page * size)
        if self.refuses:
            return 503, {"message": "unavailable"}
        if path == "/actions/runners":
            return 200, {"runners": self.runners[part]}
        if path == "/actions/artifacts":
            return 200, {"artifacts": [one for one in self.artifacts if one["name"] == query["name"]][::-1][part]}
        if found := re.fullmatch(r"/actions/artifacts/(\d+)/zip", path):
            return 302, f"{self.address}/content/{found[1]}"
        if found := re.fullmatch(r"/actions/runs/(\d+)/attempts/\d+/jobs", path):
            return 200, {"jobs": self.jobs.get(found[1], [])[part]}
        if found := re.fullmatch(r"/actions/runs/(\d+)", path):
            return 200, {"created_at": self.begun.get(found[1], "2026-01-01T00:00:00Z")}
        if found := re.fullmatch(r"/actions/runs/(\d+)/cancel", path):
            self.cancelled.append(found[1])
            return 202, {}
        if path == "/issues" and method == "GET":
            named = [one for one in self.issues if query["labels"] in one["labels"]]
            return 200, named[part]
        if path == "/issues":
            self.issues.append({"number": len(self.issues) + 1, "state": "open", **content})
            return 201, self.issues[-1]
        if found := re.fullmatch(r"/issues/(\d+)/comments", path):
            self.comments.setdefault(int(found[1]), []).append(content["body"])
            return 201, {}
        if (found := re.fullmatch(r"/issues/(\d+)", path)) and int(found[1]) in self.locked:
            return 410, {"message": "gone"}
        if (found := re.fullmatch(r"/issues/(\d+)", path)) and method == "PATCH":
            self.issues[int(found[1]) - 1].update(content)
            return 200, self.issues[int(found[1]) - 1]
        return 404, {"message": f"{method} {path}"}


@contextmanager
def serving() -> Iterator[GitHub]:
    """The server, which ends with the context."""
    known = GitHub()

    class Handler(BaseHTTPRequestHandler):
        def _carry_out(self) -> None:
            where = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            content = json.loads(self.rfile.read(length)) if length else None
            if found := re.fullmatch(r"/content/(\d+)", where.path):
                # an address of the store of artifacts, which refuses the API's token
                status = 400 if "Authorization" in self.headers else 200
                self._send(status, known.contents[int(found[1])])
                return
            if where.path == "/webhook":
                known.messages.append(content["text"])
                self._send(200, b"ok")
                return
            start = f"/repos/{REPOSITORY}"
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" or not where.path.startswith(start):
                self._send(401, b'{"message": "Bad credentials"}')
                return
            query = {name: values[0] for name, values in parse_qs(where.query).items()}
            status, answer = known.answer(self.command, where.path.removeprefix(start), query, content)
            if isinstance(answer, str):
                self._send(status, b"", answer)
            else:
                self._send(status, json.dumps(answer).encode())

        def _send(self, status: int, content: bytes, place: str = "") -> None:
            self.send_response(status)
            if place:
                self.send_header("Location", place)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_POST = do_PATCH = _carry_out

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        known.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield known
        finally:
            server.shutdown()
            thread.join()
