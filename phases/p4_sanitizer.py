"""Phase 4 and the launches of phase 3 again under compute-sanitizer, only with ``--sanitize``."""

from __future__ import annotations

import pytest

from verify import Measure, check, skip
from verify.run import sanitizer
from verify.subject.subject import Subject


@pytest.mark.sanitize
@check(
    "p4.sanitizer", gate="soft", needs_gpu=True, cases={tool: tool for tool in sanitizer.TOOLS},
    needs=("p1.identity", "p1.triton", "p3.plan"),
    claim="compute-sanitizer finds no invalid access, no uninitialised read and no race in the kernel checks.",
    reason="Reading past the end of a tensor, or uninitialised memory, gives correct scores most of the time.",
    tolerance="No error, and no racecheck warning.",
    remedy="Look at the first error: a missing mask of a load or store, or a missing barrier.",
    timeout_s=sanitizer.LIMIT_S + 60,
)  # fmt: skip
def test_sanitizer(case: str, subject: Subject, device: str, measure: Measure) -> None:
    if not sanitizer.available():
        skip("PKG_MISSING", f"{sanitizer.PROGRAM} is not on PATH; it comes with the CUDA toolkit")
    found = sanitizer.sanitize(case, *sanitizer.nodes(), subject=subject.name, device=device)
    measure(f"errors that {case} counts", found.errors, 0, where=found.first)
