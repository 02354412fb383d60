"""The server as a child: how it starts, answers and ends, by a stand-in for vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from verify.errors import Wrong
from verify.serving import server as server_module
from verify.serving.server import Server, telling

pytestmark = pytest.mark.skipif(find_spec("httpx") is None or find_spec("psutil") is None, reason="vLLM brings them")

#: Answers as vLLM does; its child has left the session, and neither ends when it is asked to.
_STAND_IN = """
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

assert os.path.isdir(os.environ["VLLM_RPC_BASE_PATH"]) and os.environ["HF_HUB_OFFLINE"] == "1"
if "broken" in sys.argv:
    print("INFO starting")
    raise ValueError("no such thing")
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = {
            "/health": "", "/v1/models": json.dumps({"data": [{"id": "m"}], "child": child.pid}),
            "/metrics": '# HELP x y\\nvllm:running{engine="0"} 1.0\\nvllm:running{engine="1"} 2.5\\nup 1\\n',
        }.get(self.path)
        self.send_response(200 if body is not None else 500)
        self.end_headers()
        self.wfile.write((body or "").encode())

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked.get("max_tokens") == -1:
            print("(EngineCore pid=1) ERROR EngineCore encountered a fatal error.")
            print("(EngineCore pid=1) ERROR TypeError: schedule() takes 1 argument", flush=True)
            os._exit(0)
        if asked.get("prompt") == "slow":
            time.sleep(2)
        if asked.get("max_tokens") == 0:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b"max_tokens is 0")
            return
        self.send_response(200)
        self.end_headers()
        if not asked.get("stream"):
            self.wfile.write(json.dumps(asked).encode())
            return
        for number in range(asked["max_tokens"]):
            self.wfile.write(f"data: {json.dumps({'n': number})}\\n\\n".encode())
        self.wfile.write(b"data: [DONE]\\n\\n")

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment in which ``python -m`` finds the stand-in, whose stubborn child is not waited for long."""
    monkeypatch.setattr(server_module, "_STOP_LIMIT_S", 2.0)
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, *package.parents[:2]):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(_STAND_IN)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_a_server_answers_and_leaves_nothing_behind(env: dict[str, str], tmp_path: Path) -> None:
    with Server("m", env, tmp_path / "log") as server:
        assert server.models() == ["m"]
        assert server.complete("hi", 3, seed=1) == {
            "prompt": "hi", "max_tokens": 3, "temperature": 0, "return_token_ids": True, "seed": 1,
        }  # fmt: skip
        assert server.metrics() == {"vllm:running": 3.5, "up": 1}
        assert list(server.stream("/v1/completions", {"max_tokens": 2})) == [{"n": 0}, {"n": 1}]
        early = server.stream("/v1/completions", {"max_tokens": 100})
        assert next(early) == {"n": 0}
        early.close()
        with pytest.raises(AssertionError, match=r"the server answered /v1/completions with 400 \(max_tokens is 0\)$"):
            server.complete("hi", 0)
        child = server._answer("GET", "/v1/models")["child"]
        sockets = Path(server._sockets)
        os.kill(child, 0)
    assert _ends(child)
    assert not sockets.exists()


def test_a_server_does_not_outlive_who_started_it(env: dict[str, str], tmp_path: Path) -> None:
    starts = (
        "import os, sys, time; from pathlib import Path; from verify.serving.server import Server\n"
        "server = Server('m', os.environ, Path(sys.argv[1])); server.launch(); server.await_health()\n"
        "print(server._process.pid, flush=True); time.sleep(60)"
    )
    paths = {"PYTHONPATH": os.pathsep.join([env["PYTHONPATH"], str(Path(__file__).parents[2])])}
    command = [sys.executable, "-c", starts, str(tmp_path / "log")]
    with subprocess.Popen(command, env=env | paths, stdout=subprocess.PIPE) as parent:
        started = int(parent.stdout.readline())
        parent.kill()
    assert _ends(started)


def _ends(pid: int) -> bool:
    """Whether the process ends within five seconds."""
    until, stat = time.monotonic() + 5, Path(f"/proc/{pid}/stat")
    while stat.exists() and " Z " not in stat.read_text():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_a_server_that_dies_tells_why(env: dict[str, str], tmp_path: Path) -> None:
    message = r"exit code 1 before it was healthy; log ends: ValueError: no such thing$"
    with pytest.raises(AssertionError, match=message), Server("m", env, tmp_path / "log", "broken"):
        pass


def test_a_server_that_is_gone_is_a_failure_with_the_error_of_its_engine(env: dict[str, str], tmp_path: Path) -> None:
    with Server("m", env, tmp_path / "log") as server:
        for request in (lambda: server.complete("x", -1), server.models, server.metrics):
            with pytest.raises(Wrong, match="the server does not answer") as caught:
                request()
            assert caught.value.cause == "the server's engine died: TypeError: schedule() takes 1 argument"


def test_a_server_that_takes_too_long_is_told_apart_from_one_that_is_wrong(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server("m", env, tmp_path / "log") as server:
        monkeypatch.setattr(server_module, "_REQUEST_LIMIT_S", 0.3)
        with pytest.raises(TimeoutError, match=r"the server did not answer within 0.3 s; log ends: "):
            server.complete("slow", 1)


def test_telling_lines_are_no_frames_and_no_progress() -> None:
    log = """\
(APIServer pid=7) INFO 11-24 17:39:20 [api_utils.py:286] non-default args
(EngineCore pid=8) ERROR 11-24 17:39:28 [core.py:1297] Traceback (most recent call last):
(EngineCore pid=8) ERROR 11-24 17:39:28 [core.py:1297]   File "vllm/v1/engine/core.py", line 1260, in run_engine_core
(EngineCore pid=8) ERROR 11-24 17:39:28 [core.py:1297]     engine_core = EngineCoreProc(*args, **kwargs)
(EngineCore pid=8) ERROR 11-24 17:39:28 [core.py:1297]                   ^^^^^^^^^^^^^^^
(EngineCore pid=8) ERROR 11-24 17:39:28 [core.py:1297] ValueError: the pool is too small
(EngineCore pid=8) ValueError: the pool is too small
Traceback (most recent call last):
  File "uvloop/loop.pyx", line 1515, in uvloop.loop.Loop.run_until_complete
RuntimeError: Engine core initialization failed.
"""
    assert telling(log) == "ValueError: the pool is too small\nRuntimeError: Engine core initialization failed."
    assert telling("") == "nothing"
