"""The process that asks a subject what it would launch: ``python -m verify.capture`` with the question on stdin.

It runs under Triton's interpreter, where kernels take CPU tensors, records every launch of the published kernel call
and runs none. So what is built ahead of time is what the subject's own code would launch, with its kernels, its block
sizes and its number of warps, and not what a table of this suite's says of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from verify.builds import Strict
from verify.device import derive_seed
from verify.launches import Launch, UnknownArgument, recorded
from verify.problems import Shape
from verify.request import DEFAULT_SEED
from verify.subject import Subject, SubjectLacks
from verify.variants import score, widened


class Captured(Strict):
    """What one variant launches, or the sentence that says why it launches nothing."""

    launches: tuple[Launch, ...] = ()
    problem: str = ""


def capture(subject: Subject, name: str, shape: Shape) -> Captured:
    """The launches of one variant. Raises UnknownArgument."""
    try:
        with recorded() as launches:
            score(subject, widened(shape), derive_seed(DEFAULT_SEED, name), "cpu")
    except UnknownArgument:
        raise
    except SubjectLacks as error:
        return Captured(problem=str(error))
    except Exception as error:  # a subject may raise anything; all of it means that this variant has no kernel
        return Captured(problem=f"the subject's call raised {type(error).__name__}: {error}")
    if not launches:
        return Captured(problem="the subject's call launched no Triton kernel")
    return Captured(launches=tuple(launches))


def main() -> int:
    """Answer the question on stdin, ``{"root": ..., "variants": {name: shape}}``, on stdout.

    The answer is the last line: ``{"captured": {name: ...}}``, or ``{"refused": sentence}``.
    """
    question = json.load(sys.stdin)
    subject = Subject(name=question["name"], root=Path(question["root"]), source=question["source"])
    subject.activate()
    shapes = {
        name: Shape(**shape | {"offsets": tuple(shape["offsets"])}) for name, shape in question["variants"].items()
    }
    try:
        captured = {name: capture(subject, name, shape).model_dump() for name, shape in shapes.items()}
    except UnknownArgument as error:
        print(json.dumps({"refused": str(error)}))
    else:
        print(json.dumps({"captured": captured}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
