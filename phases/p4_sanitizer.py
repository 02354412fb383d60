"""Phase 4 and the launches of phase 3 once more, under compute-sanitizer; only where ``--sanitize`` asks for it."""

from __future__ import annotations

import pytest

from verify import Measure, check, skip
from verify.run import sanitizer
from verify.subject.subject import Subject


@pytest.mark.sanitize
@check(
    "p4.sanitizer", gate="soft", needs_gpu=True, cases={tool: tool for tool in sanitizer.TOOLS},
    needs=("p1.identity", "p1.triton", "p3.plan"),
    claim="Under compute-sanitizer the kernel checks touch only memory that is theirs and written, and do not race.",
    reason="A read beyond the end of a tensor, or of memory that nothing wrote, gives right scores most of the time.",
    tolerance="No error; of racecheck no warning either.",
    remedy="Look at the first error: a mask of a load or a store, or a barrier that is missing.",
    timeout_s=sanitizer.LIMIT_S + 60,
)  # fmt: skip
def test_sanitizer(case: str, subject: Subject, device: str, measure: Measure) -> None:
    if not sanitizer.available():
        skip("PKG_MISSING", f"{sanitizer.PROGRAM} is not on PATH; it comes with the CUDA toolkit")
    found = sanitizer.sanitize(case, *sanitizer.nodes(), subject=subject.name, device=device)
    measure(f"errors that {case} counts", found.errors, 0, where=found.first)
