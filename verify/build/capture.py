"""The process that captures what a subject launches: ``python -m verify.build.capture`` with the question on stdin.

It runs under Triton's interpreter, where kernels take CPU tensors. It records every launch of the published kernel call
and runs none. So the kernels built ahead of time are those that the subject's own code launches, with its block sizes
and its number of warps, not those of a table in this suite.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from verify.checks import DEFAULT_SEED, derive_seed
from verify.errors import Refused, SubjectLacks
from verify.judge.offers import Offers, tested
from verify.judge.problems import Shape, make
from verify.judge.variants import USUAL, scoring_call, widened
from verify.machine.workers import end_with_parent
from verify.record.builds import NOT_OFFERED
from verify.subject.launches import Exchanged, Launch, UnknownArgument, recorded
from verify.subject.offered import narrowed
from verify.subject.refusal import accepted, refusal
from verify.subject.subject import Subject

#: The prefix of the answer on stdout, where a subject may print too.
ANSWER = "captured launches: "


def file_digest(file: Path) -> str | None:
    """The SHA-256 of a file's content; None if it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None


class Captured(Exchanged):
    """The launches of one variant, each with its alternatives, or the sentence that says why there are none."""

    launches: tuple[tuple[Launch, ...], ...] = ()
    problem: str = ""


def capture(subject: Subject, name: str, shape: Shape) -> Captured:
    """The launches of one variant. Raises UnknownArgument."""
    offers = Offers(subject, lambda problem: None, "cpu", narrowed(subject, "triton"))

    def call(within: Shape) -> None:
        scoring_call(subject, make(widened(within), derive_seed(DEFAULT_SEED, name), "cpu"), "cpu")()

    try:
        with recorded() as launches:
            call(offers.fit(shape, tested(shape, USUAL)))
    except UnknownArgument:
        raise
    except SubjectLacks as error:
        return Captured(problem=f"{NOT_OFFERED}{error}")
    except Refused as error:
        return Captured(problem=f"{NOT_OFFERED}{error.aspect}")
    except Exception as error:  # a subject may raise anything; it always means that this variant has no kernel
        with recorded():
            refused = (at := refusal(error, subject)) and accepted(lambda: call(offers.fit(USUAL, ())))
        told = f"{NOT_OFFERED}refused at {at} (" if refused else "the subject's call raised "
        return Captured(problem=f"{told}{type(error).__name__}: {error}{')' if refused else ''}")
    if not launches:
        return Captured(problem="the subject's call launched no Triton kernel")
    return Captured(launches=tuple(launches))


def main() -> int:
    """Answer the question on stdin, ``{"subject": ..., "variants": {name: shape}}``, on stdout.

    The answer is one line: ``{"captured": {name: ...}, "files": {file: sha256}}``, or ``{"refused": sentence}``.
    """
    end_with_parent()
    question = json.load(sys.stdin)
    subject = Subject.described(question["subject"])
    subject.activate()
    shapes = {
        name: Shape(**shape | {"offsets": tuple(shape["offsets"])}) for name, shape in question["variants"].items()
    }
    try:
        captured = {name: capture(subject, name, shape).model_dump() for name, shape in shapes.items()}
    except UnknownArgument as error:
        answer: dict[str, object] = {"refused": str(error)}
    else:
        answer = {"captured": captured, "files": _imported()}
    print(f"\n{ANSWER}{json.dumps(answer)}")
    return 0


def _imported() -> dict[str, str]:
    """The digests of the files of all imported modules, without those of Python and its installed packages."""
    installed = [Path(place).resolve() for place in (sys.prefix, sys.base_prefix, sys.exec_prefix)]
    files = {Path(file).resolve() for module in [*sys.modules.values()] if (file := getattr(module, "__file__", None))}
    own = [file for file in files if not any(file.is_relative_to(place) for place in installed)]
    return {str(file): digest for file in sorted(own) if (digest := file_digest(file)) is not None}


if __name__ == "__main__":
    sys.exit(main())
