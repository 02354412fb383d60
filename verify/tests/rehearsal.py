"""``make nightly-local``: seven made-up nights of six GPUs, through the nightly workflow's own steps.

The records are made up and say so (``rehearsal``): every command refuses them without ``--rehearsal``. What happens:

* night 1 and 2: every check of every GPU passes.
* night 3: a HARD check fails on sm90, and passes when it is tried again; a SOFT check fails on sm89.
* night 4: another HARD check fails on sm80, and again in the second run. The SOFT check passes again.
* night 5: the job for sm100 ran on another card. The SOFT check fails again, so it is flaky.
* night 6: the runner of sm90 dies in the middle of its job.
* night 7: a HARD check fails on sm120, a family crashes on sm100, nothing takes the job of sm121, and the check on sm80
  has passed at three commits.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ci.nightly.gpus import read_gpus
from ci.nightly.job import OUTCOME
from ci.nightly.plan import plan
from verify.checks import Check, catalogue, derive_seed
from verify.record.reading import write_record
from verify.record.schema import CheckResult, Record
from verify.tests.fake_github import GitHub, serving
from verify.tests.samples import REPOSITORY, measured, record, result

GPUS = ("sm80", "sm89", "sm90", "sm100", "sm120", "sm121")
NIGHTS = range(1, 8)

#: What fails: a check that passes the second time, two that do not, a family that crashes, and a SOFT check.
ONCE, FIRST, SECOND = "p4.scale.triton-weights", "p4.offsets.max5", "p4.permute.triton-keys"
CRASHED, FLAKY = "p6.keep_set", "p4.accuracy_class.triton-max-t0"

#: The first night of another content of the subject.
_MENDED = 5

_SHA256 = "0123456789abcdef" * 4
_LIMIT_S = 120


@dataclass(frozen=True, slots=True)
class Ended:
    """How a night ended: the exit codes of ``collect`` and ``alert``, and what they printed."""

    collected: int
    alerted: int
    printed: str
    summary: str


@dataclass(slots=True)
class Rehearsal:
    """Nights in a folder, and the GitHub that they talk to."""

    folder: Path
    github: GitHub
    checks: Sequence[Check]
    ended: list[Ended] = field(default_factory=list)
    _workflow: dict[str, str] = field(default_factory=dict)

    @property
    def nights(self) -> Path:
        return self.folder / "nights"

    @property
    def site(self) -> Path:
        return self.folder / "out" / "site"

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """``python -m`` with these words, as a step of the workflow or a user calls it."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("GITHUB_", "PYTEST_"))}
        environment |= {"TRIATTENTION_CACHE": str(self.folder / "cache"), "COLUMNS": "160"}
        return subprocess.run(
            [sys.executable, "-m", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=_LIMIT_S,
            env=environment | self._workflow,
        )  # fmt: skip

    def night(self, number: int) -> Ended:
        """Everything of one night: the jobs' artifacts, ``collect``, ``alert``, and the artifact for the next night."""
        time_utc, run = f"2026-11-{number:02d}T05:00:00Z", str(1000 + number)
        artifacts, summary = self.folder / f"artifacts-{number}", self.folder / f"summary-{number}.md"
        rows = [row for row in plan(read_gpus(), "all", None, "") if row["target"] in GPUS]
        self.github.begun[run] = f"2026-11-{number:02d}T02:17:00Z"
        self.github.jobs[run] = [self._job(row["target"], number) for row in rows]
        for row in rows:
            self._artifact(artifacts / f"record-{row['name']}-{run}-1", row["target"], number)
        shutil.rmtree(self.nights, ignore_errors=True)  # each night begins on a machine of its own
        self._workflow = {
            **self.github.environment, "GITHUB_RUN_ID": run, "GITHUB_RUN_ATTEMPT": "1", "ROWS": json.dumps(rows),
            "GITHUB_STEP_SUMMARY": str(summary), "NIGHTLY_WEBHOOK": f"{self.github.address}/webhook",
        }  # fmt: skip
        out = self.folder / "out"
        places = [f"--artifacts={artifacts}", f"--nights={self.nights}", f"--out={out}"]
        options = ["--rehearsal", f"--now={time_utc}", *([] if number == NIGHTS[-1] else ["--no-site"])]
        collected = self.command("ci.nightly.collect", *places, *options)
        alerted = self.command("ci.nightly.alert", str(out / "alerts.json"), "--rehearsal")
        self.github.keep("nights", self.nights, time_utc)
        printed = "".join((collected.stdout, collected.stderr, alerted.stdout, alerted.stderr))
        told = summary.read_text() if summary.exists() else ""
        self.ended.append(Ended(collected.returncode, alerted.returncode, printed, told))
        return self.ended[-1]

    def _job(self, target: str, number: int) -> dict[str, str]:
        taken = (target, number) != ("sm121", 7)
        conclusion = "success" if taken else "cancelled"
        conclusion = "failure" if (target, number) == ("sm90", 6) else conclusion
        return {"name": target, "runner_name": target if taken else "", "conclusion": conclusion, "status": "completed"}

    def _artifact(self, folder: Path, target: str, number: int) -> None:
        """What the job of a GPU leaves in a night; nothing if no runner took it, or if its runner died."""
        if (target, number) in (("sm121", 7), ("sm90", 6)):
            return
        card = "sm90" if (target, number) == ("sm100", 5) else target
        failing = failures(target, number, self.checks)
        first = made(card, number, failing, self.checks)
        self._keep(first, folder)
        if again := {name: "PASS" if name == ONCE else verdict for name, verdict in failing.items() if name != FLAKY}:
            self._keep(made(card, number, again, self.checks, confirms=first.run_id), folder)
        outcome = {"row": target, "exit_code": int(bool(again)), "said": f"record: {first.run_id}", "confirmed": None}
        (folder / OUTCOME).write_text(json.dumps(outcome))

    def _keep(self, one: Record, folder: Path) -> None:
        write_record(one, folder / one.run_id / "record.json")


def failures(target: str, number: int, checks: Sequence[Check]) -> dict[str, str]:
    """What fails on a GPU in a night, and how."""
    crashed = {one.id: "CRASH" for one in checks if one.spec.family == CRASHED}
    return {
        ("sm90", 3): {ONCE: "FAIL"},
        ("sm89", 3): {FLAKY: "FAIL"},
        ("sm80", 4): {FIRST: "FAIL"},
        ("sm89", 5): {FLAKY: "FAIL"},
        ("sm89", 7): {FLAKY: "FAIL"},
        ("sm100", 7): crashed,
        ("sm120", 7): {SECOND: "FAIL"},
    }.get((target, number), {})


def made(
    target: str, number: int, verdicts: Mapping[str, str], checks: Sequence[Check], confirms: str | None = None
) -> Record:
    """A made-up record that ``verify check`` finds sound: every check passed but ``verdicts``, or, if it ``confirms``
    another run, only these checks.
    """
    hour, name = (4, "c0de") if confirms else (3, "beef")
    time_utc = f"2026-11-{number:02d}T{hour:02d}:17:00Z"
    stamp = time_utc.translate(str.maketrans("", "", "-:"))
    results = [
        _result(one, verdicts.get(one.id, "PASS"), target)
        for one in checks
        if one.applies_to(target) and (confirms is None or one.id in verdicts)
    ]
    whole = record(
        target, results, seed=7, instrument_sha256=_SHA256, run_id=f"{stamp}-{target}-{name}", time_utc=time_utc,
        rehearsal=True, confirms=confirms, selection=f"--confirm {confirms}" if confirms else "everything",
    ).model_dump()  # fmt: skip
    # what failed on sm80 was mended in between, so it is not flaky
    content = _SHA256 if number < _MENDED else _SHA256[::-1]
    whole["subject"] |= {"git_sha": f"{number:040x}", "content_sha256": content}
    whole["environment"]["gpu"]["uuid_sha256"] = _SHA256
    return Record.model_validate(whole)


def _result(one: Check, verdict: str, target: str) -> CheckResult:
    numbers = measured(2.5e-6 if verdict == "FAIL" else 2e-7, 1e-6)
    words = {
        "FAIL": "error: measured 2.5e-06, allowed 1e-06 at row 0, query head 1, key 3; repeat with: ...",
        "CRASH": "the process died of signal 11 (SIGSEGV)",
    }
    return result(
        one.id, verdict, "compiled" if one.spec.ahead_of_time else "hardware", gate=one.spec.gate, plan=one.spec.plan,
        seed=derive_seed(7, one.id), measurements=[] if verdict == "CRASH" else numbers,
        message=words.get(verdict, ""), repeat=f"python -m pytest '{one.node}' --device cuda --seed 7",
    )  # fmt: skip


def rehearse(folder: Path) -> Iterator[Rehearsal]:
    """The seven nights, one after the other, in an empty folder; the last one makes the pages."""
    with serving() as github:
        found = Rehearsal(folder, github, list(catalogue()))
        for number in NIGHTS:
            found.night(number)
        yield found


def main(folder: Path) -> int:
    """Rehearse in ``folder``, which is emptied, and print what each night did."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for found in rehearse(folder):
        for number, ended in enumerate(found.ended, start=1):
            print(f"night {number}: collect {ended.collected}, alert {ended.alerted}\n{ended.printed}")
        for issue in found.github.issues:
            print(f"issue {issue['number']}, {issue['state']}: {issue['title']}")
        print(f"the pages: {found.site / 'index.html'}; the records: {found.nights} (add --rehearsal to read them)")
        return int(any(ended.collected == 3 or ended.alerted for ended in found.ended))
    return 3


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
