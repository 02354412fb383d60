"""The V2 model runner of vLLM against the V1 runner: the same requests, rounds, replies and log-probabilities.

Both are the real ones, on a CPU (``vllm_runners``). On a GPU the V2 runner is UNTESTED.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from triattention.errors import TriAttentionError
from triattention.tests.command_line import write_statistics
from triattention.tests.model_directory import write_tiny_model
from triattention.vllm.runtime import hook_targets

_LIMIT_S = 400
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="PKG_MISSING: vllm")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the V1 and the V2 runner did."""
    folder = tmp_path_factory.mktemp("runners")
    model = str(write_tiny_model(folder / "model", head_dim=32))
    settings = {
        "KV_BUDGET": "128", "DIVIDE_LENGTH": "32", "WINDOW_SIZE": "8",
        "SPARSE_STATS_PATH": write_statistics(model, folder),
    }  # fmt: skip
    environment = {f"TRIATTN_RUNTIME_{name}": value for name, value in settings.items()} | {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "triattention.tests.vllm_runners", model], env={**os.environ, **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('[{"')))


@needs_vllm
def test_the_v2_runner_replies_as_the_v1_runner(served: list[dict[str, Any]]) -> None:
    first, second = served
    assert (first["runner"], second["runner"]) == ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
    assert second["tokens"] == first["tokens"]
    # both compute the same sums in float32, of logits of about 5
    assert [step for one in second["logprobs"] for step in one] == pytest.approx(
        [step for one in first["logprobs"] for step in one], abs=1e-5
    )
    for name in ("rounds", "compactions", "rounds_missed", "preemptions", "prefix_hits"):
        assert second[name] == first[name]


@needs_vllm
def test_the_requests_have_rounds_a_preemption_and_a_prefix_from_the_cache(served: list[dict[str, Any]]) -> None:
    _, second = served
    assert second["rounds"] == second["compactions"] >= 3
    assert second["rounds_missed"] == 0
    assert second["preemptions"] >= 1
    assert second["prefix_hits"] >= 64


def test_v2_is_refused_where_the_vllm_has_not_all_of_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = hook_targets.supported()[0], hook_targets.supported()[-1]

    def report(version: str, *, without: str = "") -> None:
        entry = hook_targets.entry(version)
        targets = [
            hook_targets.Target(name, hook_targets.shown(form), "absent" if name.endswith(without or "?") else
                                hook_targets.shown(form)) for name, form in entry.items()
        ]  # fmt: skip
        monkeypatch.setattr(hook_targets, "check", lambda: hook_targets.Report(version, version, tuple(targets)))

    report(old)
    hook_targets.require_supported()
    with pytest.raises(
        TriAttentionError, match=re.escape(f"V2 model runner of vLLM {old} is not supported; set VLLM_U")
    ):
        hook_targets.require_supported(v2=True)
    report(new, without="GPUModelRunner.prepare_attn")
    hook_targets.require_supported()
    with pytest.raises(TriAttentionError, match=r"prepare_attn is absent, not \(self, input_batch\)"):
        hook_targets.require_supported(v2=True)
    report(new)
    hook_targets.require_supported(v2=True)
