"""vLLM's OpenAI server as a child process on the loopback address: started, queried, and always stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from verify.errors import Wrong
from verify.machine.processors import cores
from verify.machine.workers import end_with_parent

#: Two cores take 25 s; the rest allows for a busy machine, and for a GPU that compiles.
START_LIMIT_S = 180.0
_REQUEST_LIMIT_S = 300.0
_STOP_LIMIT_S = 20.0
_POLL_S = 0.2
_TAIL_LINES = 8
_HOST = "127.0.0.1"
_OFFLINE = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": _HOST}
#: A KV cache of 1 GiB, and no binding of threads to cores.
_ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
#: The prefix of vLLM's log lines; what marks a line that reports no problem; a frame of a traceback.
_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?(ERROR [\d-]+ [\d:]+ \[[^]]*\] ?)?")
_USUAL = re.compile(r"^(INFO|WARNING|DEBUG) |Warning: |warnings\.warn\(|^Traceback |^\s*[\^~]*$")
_FRAME = re.compile(r'^\s+File ".*", line \d+')
#: The exception of an engine that died.
_FATAL = re.compile(
    r"EngineCore (?:encountered a fatal error|failed to start)[\s\S]*?\b(\w*(?:Error|Exception): [^\n]+)"
)
_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{.*\})? (\S+)")


def block_size(device: str) -> int:
    """The smallest block size, in tokens, that every attention backend of a device supports."""
    return 32 if device == "cpu" else 16


@dataclass(frozen=True)
class Answer:
    """The answer to a request: the server's name for it, prompt and new token ids, text and ``usage``.

    ``log_probs`` are those of the new tokens, if a completion was asked for ``logprobs``.
    """

    id: str
    prompt: list[int]
    tokens: list[int]
    text: str
    finish_reason: str
    usage: Mapping[str, int]
    log_probs: Sequence[float] = ()


def answer_of(data: Mapping[str, Any]) -> Answer:
    """The only choice of a completion or chat completion that was requested with ``return_token_ids``."""
    (choice,) = data["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    prompt = choice.get("prompt_token_ids") or data.get("prompt_token_ids") or []
    tokens = choice.get("token_ids") or []
    log_probs = (choice.get("logprobs") or {}).get("token_logprobs") or ()
    return Answer(data["id"], prompt, tokens, text or "", choice["finish_reason"], data.get("usage") or {}, log_probs)


class Server:
    """``python -m vllm.entrypoints.openai.api_server`` for the model in ``location``, within a ``with`` statement.

    ``env`` is the complete base environment; variables that keep the server offline and, on a ``cpu``, small are added.
    On a CPU it has a thread for each core if it is ``alone``, else OMP_NUM_THREADS of ``env`` or 1, because the threads
    of servers that share a few cores wait for each other. ``log`` gets everything that is printed. Raises TimeoutError
    for a server that is not healthy within START_LIMIT_S, AssertionError for one that leaves a process behind, each
    with the end of the log.
    """

    def __init__(
        self, location: str, env: Mapping[str, str], log: Path, *flags: str, device: str = "cpu", alone: bool = False
    ) -> None:
        self.log = log
        self._env = {**env, **_OFFLINE}
        if device == "cpu":
            threads = str(len(cores())) if alone else env.get("OMP_NUM_THREADS", "1")
            self._env |= {**_ON_CPU, "OMP_NUM_THREADS": threads}
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", location, "--host", _HOST,
            "--port", str(self._port), "--block-size", str(block_size(device)), "--enforce-eager", *flags,
        ]  # fmt: skip

    def __enter__(self) -> Self:
        self.launch()
        try:
            self.await_health()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def launch(self) -> None:
        """Start the process without waiting until it is healthy, so that several servers can start at once."""
        # a killed server leaves its sockets behind; their paths may have at most 107 characters
        self._sockets = tempfile.mkdtemp(prefix="verify-")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, env={**self._env, "VLLM_RPC_BASE_PATH": self._sockets}, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent,
            )  # fmt: skip

    def await_health(self) -> None:
        """Wait until the launched server answers. Raises TimeoutError, with the end of the log, if it does not, and
        Wrong if it has ended.
        """
        import httpx

        until = time.monotonic() + START_LIMIT_S
        while self._process.poll() is None:
            try:
                if httpx.get(f"http://{_HOST}:{self._port}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:  # not listening yet
                pass
            if time.monotonic() >= until:
                raise TimeoutError(self._told(f"was not healthy within {START_LIMIT_S:g} s"))
            time.sleep(_POLL_S)
        raise Wrong(self._told(f"ended with exit code {self._process.returncode} before it was healthy"), self._cause())

    def _told(self, what: str) -> str:
        return f"the server {what}; {self.log.name} ends: {telling(self.text())}"

    def text(self) -> str:
        """Everything that the server's processes printed so far."""
        return self.log.read_text("utf-8", errors="replace")

    def stop(self) -> None:
        """End the server's processes, first with SIGTERM; does nothing if there are none.

        Raises AssertionError if one is still there afterwards.
        """
        import psutil

        if self._process is None or not os.path.isdir(self._sockets):
            return
        running = self._processes()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(running, timeout=_STOP_LIMIT_S)
        for process in {*left, *self._processes()}:
            process.kill()
        self._process.wait()
        _, left = psutil.wait_procs([*left, *self._processes()], timeout=_STOP_LIMIT_S)
        shutil.rmtree(self._sockets)
        assert not left, f"processes of the server are still there after SIGKILL: {left}"

    def _processes(self) -> list[Any]:
        """The live processes of the server, including those without their parent or outside its process group."""
        import psutil

        found = {process for process in psutil.process_iter() if _session_of(process.pid) == self._process.pid}
        if self._process.poll() is None:
            found.update(psutil.Process(self._process.pid).children(recursive=True))
        return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def models(self) -> list[str]:
        """The names that the server lists."""
        return [model["id"] for model in self._answer("GET", "/v1/models")["data"]]

    def complete(self, prompt: str | list[int], max_tokens: int, **extra: Any) -> dict[str, Any]:
        """The answer of /v1/completions to one prompt, greedy unless ``extra`` says otherwise, with its token ids."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True, **extra}
        return self._answer("POST", "/v1/completions", body)

    def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of /v1/chat/completions."""
        return self._answer("POST", "/v1/chat/completions", body)

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The chunks of a streamed answer; to disconnect early, call ``close()`` on the iterator."""
        until = time.monotonic() + _REQUEST_LIMIT_S
        with self._client() as client, client.stream("POST", path, json={**body, "stream": True}) as response:
            if response.is_error:
                response.read()
            self._check(response)
            for line in response.iter_lines():
                if time.monotonic() >= until:
                    raise TimeoutError(f"{path} did not end its stream within {_REQUEST_LIMIT_S:g} s")
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))

    def metrics(self) -> dict[str, float]:
        """The samples of /metrics, each name summed over its labels."""
        with self._client() as client:
            response = client.get("/metrics")
        self._check(response)
        found: dict[str, float] = defaultdict(float)
        for sample in map(_SAMPLE.match, response.text.splitlines()):
            if sample:
                found[sample[1]] += float(sample[2])
        return dict(found)

    def memory_bytes(self) -> int:
        """Resident memory of the server's processes; shared memory counts once for each process."""
        return sum(process.memory_info().rss for process in self._processes())

    def idle(self, limit_s: float = 30.0) -> dict[str, float]:
        """The metrics once no request is running or waiting. Raises TimeoutError if that takes longer."""
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            metrics = self.metrics()
            if not metrics["vllm:num_requests_running"] and not metrics["vllm:num_requests_waiting"]:
                return metrics
            time.sleep(_POLL_S)
        raise TimeoutError(f"requests are still running or waiting {limit_s:g} s after the last answer")

    def _answer(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        with self._client() as client:
            response = client.request(method, path, json=body)
        self._check(response)
        return response.json()

    @contextmanager
    def _client(self) -> Iterator[Any]:
        """A client of the server. Raises Wrong, with the end of the log, if nothing answers any more, TimeoutError if
        an answer takes longer than _REQUEST_LIMIT_S: the server may be wrong, or its machine busy.
        """
        import httpx

        place = f"http://{_HOST}:{self._port}"
        try:
            # ignore the user's proxy: nothing here leaves the machine
            with httpx.Client(base_url=place, timeout=_REQUEST_LIMIT_S, trust_env=False) as client:
                yield client
        except httpx.TimeoutException as error:
            raise TimeoutError(self._told(f"did not answer within {_REQUEST_LIMIT_S:g} s")) from error
        except httpx.TransportError as error:
            raise Wrong(self._told(f"does not answer ({type(error).__name__}: {error})"), self._cause()) from error

    def _cause(self) -> str:
        """The error that ended the server's engine, if the log of a dead one names it."""
        found = _FATAL.search(self.text())
        return f"the server's engine died: {found[1]}" if found else ""

    def _check(self, response: Any) -> None:
        if response.is_success:
            return
        told = f"answered {response.request.url.path} with {response.status_code} ({response.text[:400]})"
        # a client error explains itself; for a server error the log says more
        if not response.is_server_error:
            raise AssertionError(f"the server {told}")
        raise Wrong(self._told(told), self._cause())


def telling(log: str) -> str:
    """The last lines of a vLLM log that report a problem: no traceback frames, no progress, no duplicates."""
    lines, after_frame = {}, False
    for line in (_PREFIX.sub("", line) for line in log.splitlines()):
        source, after_frame = after_frame and line.startswith("    "), bool(_FRAME.match(line))
        if not (source or after_frame or _USUAL.search(line)):
            lines[line.strip()] = None
    return "\n".join(list(lines)[-_TAIL_LINES:]) or "nothing"


def _end_with_parent() -> None:
    end_with_parent(signal.SIGTERM)  # on SIGTERM, unlike SIGKILL, a server ends its own processes


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((_HOST, 0))
        return free.getsockname()[1]


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
