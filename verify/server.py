"""A vLLM server as a subprocess on loopback: started with a subject's plugin, asked, and stopped whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from verify.subject import Subject

_START_LIMIT_S = 240.0
_ANSWER_LIMIT_S = 300.0
#: A server that is told to stop drains its requests first, and its own children have a few seconds each.
_STOP_LIMIT_S = 30.0
_TELLING = re.compile(r"Error|error:|\[TriAttention\]")

#: What the CPU engine needs: a KV cache of 1 GiB, and no core set aside; nothing is sent anywhere.
_ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "passive"}
_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CONFIGURE_LOGGING": "1"}

#: The name under which the model is served.
MODEL = "model"


def block_size(device: str) -> int:
    """The smallest block that every attention backend of the device takes, in tokens."""
    return 32 if device == "cpu" else 16


@dataclass(frozen=True)
class Answer:
    """What came back: the server's id of the request, prompt and new token ids, text, finish reason and ``usage``."""

    id: str
    prompt: list[int]
    tokens: list[int]
    text: str
    finish_reason: str
    usage: dict[str, int]


class Server:
    """``python -m vllm.entrypoints.openai.api_server`` (``vllm serve`` does not start from the CPU wheel).

    ``directory`` takes its log and sockets; ``environment`` is added to the subject's. Use it as a context manager;
    entering waits until it answers. Raises AssertionError, ending with what its log says, when it does not.
    """

    def __init__(
        self, model: str, subject: Subject, device: str, directory: Path, *flags: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.log = directory / "server.log"
        self._port = _free_port()
        # a socket's path may have about a hundred characters, and a test's directory can have more
        self._sockets = tempfile.TemporaryDirectory(prefix="vllm-")
        own = {**_QUIET, **(_ON_CPU if device == "cpu" else {}), "VLLM_RPC_BASE_PATH": self._sockets.name}
        self._environment = {**subject.environment(), **own, **(environment or {})}
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", MODEL,
            "--host", "127.0.0.1", "--port", str(self._port), "--block-size", str(block_size(device)), *flags,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Start the process, without waiting for it."""
        with self.log.open("wb") as stream:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=stream,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Self:
        if self._process is None:
            self.launch()
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and every process it started, gently first; does nothing where there is none."""
        process, self._process = self._process, None
        if process is None:
            return
        import psutil

        with suppress(psutil.NoSuchProcess):
            family = [*psutil.Process(process.pid).children(recursive=True)]
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_LIMIT_S)
            _, alive = psutil.wait_procs(family, timeout=5)
            for child in alive:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._sockets.cleanup()

    def ends(self, limit_s: float = _START_LIMIT_S) -> tuple[int, str]:
        """Wait for a server that is expected to refuse: its exit code and its log."""
        try:
            code = self._process.wait(limit_s)
        finally:
            self.stop()
        return code, self.log.read_text("utf-8", errors="replace")

    def said(self) -> str:
        """The telling lines at the end of the log."""
        lines = self.log.read_text("utf-8", errors="replace").splitlines()
        return "\n".join([line for line in lines if _TELLING.search(line)][-8:] or lines[-8:])

    def _wait(self) -> None:
        import httpx

        deadline = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline:
            code = self._process.poll()
            assert code is None, f"the server ended with exit code {code} before it answered; it said: {self.said()}"
            with suppress(httpx.TransportError):
                if httpx.get(self._url("/health"), timeout=5).status_code == 200:
                    return
            time.sleep(0.25)
        raise AssertionError(f"the server did not answer within {_START_LIMIT_S:g} s; it said: {self.said()}")

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._port}{path}"

    def get(self, path: str) -> Any:
        """The JSON at ``path``. Raises AssertionError for another status than 200."""
        import httpx

        response = httpx.get(self._url(path), timeout=_ANSWER_LIMIT_S)
        assert response.status_code == 200, f"GET {path} answered {response.status_code}: {response.text[:500]}"
        return response.json()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that a request is answered with. Raises AssertionError for another status than 200."""
        import httpx

        response = httpx.post(self._url(path), json={"model": MODEL, **body}, timeout=_ANSWER_LIMIT_S)
        assert response.status_code == 200, f"POST {path} answered {response.status_code}: {response.text[:500]}"
        return response.json()

    @contextmanager
    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """The chunks of a streamed answer, as they come; leaving early hangs up on the server."""
        import httpx

        sent = {"model": MODEL, "stream": True, **body}
        with httpx.stream("POST", self._url(path), json=sent, timeout=_ANSWER_LIMIT_S) as response:
            assert response.status_code == 200, f"POST {path} answered {response.status_code}: {response.read()[:500]}"
            yield _chunks(response.iter_lines())

    def complete(self, prompt: str | Sequence[int], max_tokens: int, **options: Any) -> Answer:
        """Exactly ``max_tokens`` new tokens, greedy."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return answer_of(self.post("/v1/completions", {**body, "return_token_ids": True, **options}))

    def metrics(self) -> dict[str, float]:
        """Every metric of the server by name, summed over its labels."""
        import httpx

        totals: dict[str, float] = {}
        for line in httpx.get(self._url("/metrics"), timeout=_ANSWER_LIMIT_S).text.splitlines():
            found = re.match(r"([a-zA-Z_:][\w:]*)(?:\{.*\})? ([^ ]+)$", line)
            if found:
                totals[found[1]] = totals.get(found[1], 0.0) + float(found[2])
        return totals

    def idle(self, limit_s: float = 30.0) -> dict[str, float]:
        """The metrics once no request is running or waiting. Raises AssertionError if that takes too long."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            metrics = self.metrics()
            if not metrics["vllm:num_requests_running"] and not metrics["vllm:num_requests_waiting"]:
                return metrics
            time.sleep(0.2)
        raise AssertionError(f"requests are still running or waiting {limit_s:g} s after the last answer")


def answer_of(data: Mapping[str, Any]) -> Answer:
    """The only choice of a completion or chat completion that was asked for with ``return_token_ids``."""
    (choice,) = data["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    prompt = choice.get("prompt_token_ids") or data.get("prompt_token_ids") or []
    return Answer(
        data["id"], prompt, choice.get("token_ids") or [], text or "", choice["finish_reason"], data.get("usage") or {}
    )


def _chunks(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
