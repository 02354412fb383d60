"""Whether the packages that the doctor reports work here: each is imported in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from verify.files import repository_root
from verify.machine.environment import NOT_INSTALLED, localise
from verify.report.doctor_table import Finding, Status
from verify.report.sentences import stack_words

#: Triton with the programs that assemble for a GPU before and from Blackwell on; older releases cannot be asked.
_ASSEMBLERS = """
import triton.language
from triton.backends.nvidia import compiler
for arch in (90, 120):
    getattr(compiler, "get_ptxas", str)(arch)
"""

#: What shows, in a process of its own, that a package works here; none of it needs a GPU.
_TRIALS = {
    "torch": ("PyTorch", "import torch; torch.ones(2) @ torch.ones(2)"),
    "triton": ("Triton", _ASSEMBLERS),
    "transformers": ("transformers", "from transformers import AutoModelForCausalLM, DynamicCache"),
    "flash-attn": ("flash-attn", "from flash_attn import flash_attn_func"),
    "vllm": ("vLLM", "import vllm"),
}
_TRIAL_LIMIT_S = 120


def stack(packages: Mapping[str, str]) -> list[Finding]:
    """A note if records that are made here name another stack than the pinned one."""
    told = stack_words(packages)
    return [Finding("stack", "not the pinned one", "any", Status.NOTE, f"records are made with {told}")] if told else []


def tried(packages: Mapping[str, str]) -> dict[str, str]:
    """Why each installed package that does not work here does not, by the name of its finding."""
    from concurrent.futures import ThreadPoolExecutor

    wanted = [trial for name, trial in _TRIALS.items() if packages[name] != NOT_INSTALLED]
    with ThreadPoolExecutor(max(len(wanted), 1)) as beside:
        found = beside.map(_failure, [program for _, program in wanted])
        return {what: why for (what, _), why in zip(wanted, found, strict=True) if why}


def _failure(program: str) -> str:
    """The last line that a failing program printed; empty if it works."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        child = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=_TRIAL_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"it is not imported within {_TRIAL_LIMIT_S} s"
    said = child.stderr.strip().splitlines() or [f"it ended with {child.returncode}"]
    return localise(said[-1], repository_root()) if child.returncode else ""


def mended(findings: Sequence[Finding], broken: Mapping[str, str]) -> list[Finding]:
    """The findings, with those that say OK of a package that is ``broken`` saying why it is."""
    return [
        replace(
            one,
            status=Status.NOTE if one.what in _OPTIONAL else Status.NEEDED,
            step=f"{broken[one.what]}; install it again, in a build that fits the other packages",
        )
        if one.what in broken and one.status in (Status.OK, Status.NOTE)
        else one
        for one in findings
    ]


#: Findings about packages that only some SOFT checks use.
_OPTIONAL = ("flash-attn", "vLLM")
