"""The interpreter that looks things up once gives the same bits, and replaces the same names."""

from __future__ import annotations

import json
import os
import subprocess
import sys

_SCRIPT = """
import hashlib, inspect, json, sys
import triton.language as tl
from triton.runtime import interpreter
from verify.judge.interpreter import quicken
from verify.judge.problems import Shape, make
from verify.judge.scoring import kernel
from verify.subject.find import find_subject
from verify.files import repository_root
from verify.judge import guarded, scoring

quick = sys.argv[1] == "quick"
guarded.quicken = scoring.quicken = quicken if quick else lambda: None
subject = find_subject("bundled", repository_root())
subject.activate()
scores = [
    kernel(subject, make(Shape(n=65, t=200, d=64, dtype=dtype, aggregation=how), 3, "cpu")).scores
    for dtype in ("float32", "bfloat16") for how in ("mean", "max")
]
before = {name for name, _ in inspect.getmembers(tl.core, tl.core.is_builtin)}
counterpart = [str(interpreter._get_np_dtype(t)) for t in (tl.float32, tl.bfloat16, tl.pointer_type(tl.int8))]
block = str(interpreter._get_np_dtype(tl.block_type(tl.int16, [4])))
print(json.dumps({
    "scores": [hashlib.sha256(one.tobytes()).hexdigest() for one in scores],
    "builtins left": sorted(before), "counterparts": [*counterpart, block],
    "quick": interpreter.inspect is not inspect,
}))
"""


def _told(how: str) -> dict[str, object]:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, how], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_quick_interpreter_computes_and_replaces_the_same() -> None:
    usual, quick = _told("usual"), _told("quick")
    assert (usual.pop("quick"), quick.pop("quick")) == (False, True)
    assert usual == quick
    assert quick["counterparts"] == ["float32", "uint16", "uint64", "int16"]
