"""The part of GitHub's REST API that the nightly workflow needs. Standard library only, and ours that needs no more.

https://docs.github.com/en/rest
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from ci.nightly import NightlyError
from verify.report import workflow

_LIMIT_S = 60

#: The pauses before a question is asked again.
_PAUSES_S = (1, 4)
_PAGE = 100

#: More pages than any list of the workflow can have.
_MOST_PAGES = 50


class _Unanswered(Exception):
    """The server failed, or could not be reached."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the address of an artifact's content must not get the token."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Api:
    """The API of one repository. Every call raises NightlyError if the server cannot be asked, or refuses."""

    address: str
    repository: str
    token: str

    @classmethod
    def of_environment(cls, token: str = "GITHUB_TOKEN") -> Api | None:
        """As a workflow's environment says; None without the ``token`` or the name of the repository."""
        repository, secret = os.environ.get("GITHUB_REPOSITORY", ""), os.environ.get(token, "")
        if not repository or not secret:
            return None
        return cls(os.environ.get("GITHUB_API_URL", "https://api.github.com"), repository, secret)

    def get(self, path: str, **query: object) -> Any:
        return self._json("GET", path + (f"?{urllib.parse.urlencode(query)}" if query else ""))

    def pages(self, path: str, key: str = "", **query: object) -> Iterator[Any]:
        """Every item of a list, page by page; ``key`` names the list where the answer is an object."""
        for page in range(1, _MOST_PAGES + 1):
            answer = self.get(path, **query, per_page=_PAGE, page=page)
            items = answer[key] if key else answer
            yield from items
            if len(items) < _PAGE:
                return

    def post(self, path: str, content: object = None) -> Any:
        return self._json("POST", path, content)

    def patch(self, path: str, content: object) -> Any:
        return self._json("PATCH", path, content)

    def download(self, path: str) -> bytes:
        """The content that an address of the API redirects to, which is asked for without the token."""
        content, place = self._asked("GET", path, None)
        if not place:
            return content
        try:
            with urllib.request.urlopen(place, timeout=_LIMIT_S) as answer:
                return bytes(answer.read())
        except (OSError, HTTPException) as error:
            raise NightlyError(f"GET {path}: its content cannot be fetched ({error})") from error

    def _json(self, method: str, path: str, content: object = None) -> Any:
        text, _ = self._asked(method, path, content)
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise NightlyError(f"{method} {path}: the answer is not JSON ({error})") from error

    def _asked(self, method: str, path: str, content: object) -> tuple[bytes, str]:
        """What is answered, and the address that it redirects to (empty: none). A question is asked again if the server
        fails or does not answer; what changes something is asked for once.
        """
        for pause_s in (*_PAUSES_S, None) if method == "GET" else (None,):
            try:
                return self._answer(method, path, content)
            except _Unanswered as error:
                if pause_s is None:
                    raise NightlyError(str(error)) from error
                time.sleep(pause_s)
        raise AssertionError("the last pause is None")

    def _answer(self, method: str, path: str, content: object) -> tuple[bytes, str]:
        request = urllib.request.Request(
            f"{self.address}/repos/{self.repository}{path}",
            method=method,
            data=None if content is None else json.dumps(content).encode(),
            headers={
                "Accept": "application/vnd.github+json",
                "Authorization": f"Bearer {self.token}",
                "X-GitHub-Api-Version": "2022-11-28",
                "User-Agent": "triattention-verification",
            },
        )
        try:
            with urllib.request.build_opener(_Stay).open(request, timeout=_LIMIT_S) as answer:
                return bytes(answer.read()), ""
        except urllib.error.HTTPError as error:
            with error:
                if 300 <= error.code < 400:
                    return b"", error.headers["Location"]
                said = " ".join(error.read(500).decode("utf-8", "replace").split())
            told = f"{method} {path}: GitHub answers {error.code} ({said})"
            raise (_Unanswered if error.code >= 500 else NightlyError)(told) from error
        except (OSError, HTTPException) as error:
            raise _Unanswered(f"{method} {path}: GitHub cannot be reached ({error})") from error


def output(**values: str) -> None:
    """Set outputs of the running step, or print them where there is no workflow."""
    lines = "".join(f"{name}={value}\n" for name, value in values.items())
    if (path := os.environ.get("GITHUB_OUTPUT")) is None:
        print(lines, end="")
        return
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(lines)


def summarise(text: str) -> None:
    """Append Markdown to the summary of the running step, or print it where there is no workflow."""
    if not workflow.summarise(text):
        print(text)
