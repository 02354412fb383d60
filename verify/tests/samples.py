"""Checks and records to read: a small tree of phases and hand-made results for it."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from verify.architectures import known_targets
from verify.checks import Check, CheckSpec
from verify.record.builds import Code, Compilation
from verify.record.curves import Curve, Point
from verify.record.findings import findings
from verify.record.known_failures import KnownFailure
from verify.record.reading import UnreadableRecord, read_record, write_record
from verify.record.schema import CheckResult, Deviation, Environment, Gpu, Measurement, Record, SubjectInfo, Waiver
from verify.record.simulation import Simulation

REPOSITORY = Path(__file__).resolve().parents[2]

#: Digests that could be true.
PTX_SHA256, SIMULATOR_SHA256 = (hashlib.sha256(text).hexdigest() for text in (b"ptx", b"simulator"))

#: What results made by hand rest on: the file as it is.
ORACLE = "verify/judge/oracle.py"
ORACLE_SHA256 = hashlib.sha256((REPOSITORY / ORACLE).read_bytes()).hexdigest()


class MeasuredReport(NamedTuple):
    """A report as a user calls it, and what it took: all its processes together, their memory every 50 ms."""

    exit_code: int
    processor_s: float
    wall_s: float
    mebibytes: float
    printed: str
    said: str


def measure_report(*words: str, cwd: Path, cache: Path) -> MeasuredReport:
    """``verify report`` with these words. A page of memory that processes share counts once."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TRIATTENTION_CACHE": str(cache)}
    before, start, peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "verify", "report", *words]
        with subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=printed, stderr=said, start_new_session=True
        ) as report:
            while report.poll() is None:
                if time.monotonic() - start > 120:
                    os.killpg(report.pid, signal.SIGKILL)
                peak_kib = max(peak_kib, _memory_kib(report.pid))
                time.sleep(0.05)
        wall_s, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        processor_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        for stream in (printed, said):
            stream.seek(0)
        return MeasuredReport(report.returncode, processor_s, wall_s, peak_kib / 1024, printed.read(), said.read())


def reading_s(folder: Path) -> float:
    """Processor seconds that reading every record under ``folder`` takes here and now, judged by a hundred of them."""
    files = sorted(folder.rglob("*.json"))
    some = files[:: max(len(files) // 100, 1)]
    begun = time.process_time()
    for file in some:
        with suppress(UnreadableRecord):
            read_record(file)
    return (time.process_time() - begun) * len(files) / len(some)


def _memory_kib(session: int) -> int:
    """The proportional set size of every process of a session."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # gone meanwhile
            if os.getsid(int(process.name)) == session:
                found += int((process / "smaps_rollup").read_text().partition("\nPss:")[2].split()[0])
    return found


#: A phases package with one family of each kind: plan table hard, beyond it, GPU only, soft with several cases.
TREE = {
    "p1_environment.py": """
from verify.checks import check

TEXT = dict(reason="A GPU that torch cannot see verifies nothing.", remedy="Install torch's CUDA build.")

@check("p1.bf16", gate="hard", plan="1.1", cases="matmul", claim="A bf16 product is right.", **TEXT)
def test_bf16(case): ...

@check("p1.torch_sees", gate="hard", plan="1.3", cases="gpu", claim="torch sees the GPU.", needs_gpu=True, **TEXT)
def test_torch(case): ...

@check("p1.nvcc", gate="soft", plan="1.2", cases="version", claim="The CUDA toolkit is new enough.", **TEXT)
def test_nvcc(case): ...
""",
    "p4_equivalence.py": """
from verify.checks import check

TEXT = dict(reason="Scores decide what is kept.", remedy="Compare both with the oracle.", tolerance="derived budget")

@check("p4.oracle", gate="hard", cases={"n1": 1, "n33": 33}, claim="Within class A.", **TEXT | {"needs": ("p1.bf16",)})
def test_oracle(case): ...

@check("p4.triton_pytorch", gate="hard", plan="3.2", cases={"mean": 0, "max": 1}, claim="Both paths agree.", **TEXT)
def test_pair(case): ...
""",
    "p8_latency.py": """
from verify.checks import check

@check("p8.kernel", gate="soft", plan="6.1", cases="ms", claim="Fast.", reason="Speed is why.", remedy="Report it.")
def test_kernel(case): ...
""",
}

HARD = ("p1.bf16.matmul", "p1.torch_sees.gpu", "p4.oracle.n1", "p4.oracle.n33", "p4.triton_pytorch.mean")
HARD += ("p4.triton_pytorch.max",)


def write_tree(root: Path) -> Path:
    """A checkout in miniature at ``root``: phases only, with empty reports."""
    (root / "phases").mkdir(parents=True)
    (root / "phases" / "__init__.py").touch()
    for name, text in TREE.items():
        (root / "phases" / name).write_text(text)
    return root


def checks() -> list[Check]:
    """The catalogue of the tree, without importing it."""

    def family(name: str, gate: str, cases: list[str], plan: str | None = None, needs_gpu: bool = False) -> list[Check]:
        spec = CheckSpec(name, gate, "claim", "reason", "remedy", dict.fromkeys(cases), plan, needs_gpu=needs_gpu)
        return [Check(spec.id_of(case), case, spec, f"phases/x.py::test[{case}]") for case in spec.cases]

    return [
        *family("p1.bf16", "hard", ["matmul"], "1.1"),
        *family("p1.torch_sees", "hard", ["gpu"], "1.3", needs_gpu=True),
        *family("p1.nvcc", "soft", ["version"], "1.2"),
        *family("p4.oracle", "hard", ["n1", "n33"]),
        *family("p4.triton_pytorch", "hard", ["mean", "max"], "3.2"),
        *family("p8.kernel", "soft", ["ms"], "6.1"),
    ]


def result(check_id: str, verdict: str = "PASS", evidence: str = "hardware", **fields: object) -> CheckResult:
    """A result that is consistent whatever the verdict."""
    failing = verdict not in ("PASS", "SKIP", "BLOCKED")
    defaults = {
        "gate": "hard" if check_id in HARD else "soft",
        "seed": 1,
        "duration_s": 0.5,
        "message": "measured 2, allowed 1" if failing else "",
        "repeat": f"python -m pytest 'phases/x.py::{check_id}'",
        "code": "PKG_MISSING" if verdict == "SKIP" else None,
        "by": "p1.bf16.matmul" if verdict == "BLOCKED" else None,
    }
    return CheckResult(id=check_id, verdict=verdict, evidence=evidence, **(defaults | fields))


def known(check_id: str, **fields: object) -> CheckResult:
    """A failure that is a known deviation."""
    why = Deviation(reason="Zeros are NaN.", issue="https://example.org/12", expires=date(2027, 3, 1))
    return result(check_id, "FAIL", **{"deviation": why} | fields)


def known_failure(*names: str, **fields: Any) -> KnownFailure:
    """An entry of the suite's list of known failures; it was added today, and counts for a month."""
    today = datetime.now(UTC).date()
    usual = {"reason": "Zeros are NaN.", "issue": "https://example.org/12", "owner": "@owner", "probe": "make probe"}
    usual |= {"added": today, "expires": today + timedelta(days=30)}
    return KnownFailure(checks=[*names], **usual | fields)


def waived(check_id: str, **fields: object) -> CheckResult:
    """A failure that the suite's list of known failures has."""
    why = Waiver(
        verdict="FAIL", reason="Zeros are NaN.", issue="https://example.org/12", owner="@owner",
        expires=date(2027, 1, 31),
    )  # fmt: skip
    return result(check_id, "WAIVED", **{"waiver": why} | fields)


def measured(value: float, allowed: float, name: str = "error") -> list[Measurement]:
    return [Measurement(name=name, measured=value, allowed=allowed)]


def curve(name: str, points: list[Point], x: str = "generated tokens", y: str = "KV blocks") -> Curve:
    return Curve(name=name, x=x, y=y, points=points)


def record(target: str, results: Iterable[CheckResult], *, day: int = 1, **fields: object) -> Record:
    """A record of ``target`` made on ``day`` of a month."""
    without_gpu = target == "emulated" or fields.keys() & {"compilation", "simulation"}
    sm = None if without_gpu else int(target.removeprefix("sm"))
    gpu = Gpu(name=f"Sample GPU {sm}", uuid_sha256="0" * 64, sm=sm, memory_gib=16, driver="580.1") if sm else None
    environment = Environment(
        gpu=gpu,
        cuda_runtime="13.0",
        cuda_toolkit="not installed",
        torch="2.13.0",
        triton="3.7.1",
        ptxas={},
        flash_attn="not installed",
        vllm="not installed",
        transformers="5.19.0",
        python="3.11.7",
        os="Linux",
        variables={"TRITON_DEFAULT_FP_FUSION": "1"},
    )
    subject = SubjectInfo(
        name="sample", version="1.0", source="bundled", git_sha="1234567890", dirty=False, content_sha256="0" * 64
    )
    defaults = {"state": "complete", "model": "embedded", "seed": 0, "selection": "all", "duration_s": 1.0}
    defaults |= {"instrument_sha256": "0" * 64, "sources": {ORACLE: ORACLE_SHA256}, "rests_on": [[ORACLE]]}
    defaults |= {"run_id": f"run-{target}-{day}", "time_utc": f"2026-11-{day:02d}T00:00:00Z"}
    results = list(results)
    defaults |= {"findings": findings(results, {})}
    return Record(
        target=target,
        subject=subject,
        environment=environment,
        results=[one.model_copy(update={"rests_on": 0}) for one in results],
        **(defaults | fields),
    )


def compiled(target: str, results: Iterable[CheckResult] = (), *, gap: str = "", **fields: object) -> Record:
    """A record of kernels built for ``target`` ahead of time."""
    used = {"registers": 48, "stack_bytes": 0, "shared_bytes": 128, "warps": 4, "occupancy": 0.5, "code": None}
    build = {"kernel": "k", "variants": ["v"], "verdict": "OK", "duration_s": 0.5, "resources": used}
    build |= {"ptx_sha256": "0" * 64, "cubin_sha256": "0" * 64}
    toolchain = "TOOLCHAIN_TOO_OLD" if gap else "OK"
    one = {"sm": int(target.removeprefix("sm")), "triton": "3.7.1", "ptxas": "13.1", "toolchain": toolchain, "gap": gap}
    found = Compilation.model_validate(one | {"builds": [] if gap else [build]})
    return record(target, results, **({"compilation": found, "run_id": f"run-{target}-compiled"} | fields))


def counted(target: str, instructions: dict[str, float | None]) -> Record:
    """A compilation in which these variants execute so many warp instructions per key; None is not counted."""
    made = compiled(target)
    (one,) = made.compilation.builds
    code = {"instructions": 100, "spill_store_bytes": 0, "spill_load_bytes": 0, "loads": {}, "special_functions": 0}
    builds = []
    for variant, number in instructions.items():
        found = Code(warp_instructions_per_key=number, uncounted="" if number else "a branch on data", **code)
        used = one.resources.model_copy(update={"code": found})
        builds.append(one.model_copy(update={"variants": [variant], "resources": used}))
    return made.model_copy(update={"compilation": made.compilation.model_copy(update={"builds": builds})})


def simulation(sm: int = 120, **fields: object) -> Simulation:
    """A simulation of one kernel, whose machine code has the same floating-point instructions."""
    counts = {"fma": 12, "mul": 3, "add": 9}
    one = {"kernel": "score", "ptx_sha256": PTX_SHA256, "launches": 400, "thread_instructions": 10**7}
    kernels = [one | {"census": {"ptx": counts, "sass": counts}}]
    usual = {"sm": sm, "triton": "3.7.1", "simulator_sha256": SIMULATOR_SHA256, "poisons": ["0x7fc00000"]}
    usual |= {"modes": ["nearest", "lowest", "highest"], "warp_orders": [0, 1], "kernels": kernels}
    return Simulation.model_validate(usual | {"not_executed": ["ptxas", "the card"]} | fields)


def simulated(target: str, results: Iterable[CheckResult], **fields: object) -> Record:
    """A record of kernels compiled for ``target`` and executed by the simulator."""
    usual = {"simulation": simulation(int(target.removeprefix("sm"))), "run_id": f"run-{target}-simulated"}
    return record(target, results, **(usual | fields))


def passing(evidence: str = "hardware") -> list[CheckResult]:
    """Every must-pass check passed; the emulated target has no GPU-only check."""
    ids = HARD if evidence != "emulated" else [name for name in HARD if name != "p1.torch_sees.gpu"]
    return [result(name, evidence=evidence, measurements=measured(1e-7, 1e-6)) for name in ids]


def write(record: Record, reports: Path, folder: str = "runs") -> Path:
    """Put a record where the suite looks for it."""
    name = f"{record.run_id}/record.json" if folder == "runs" else f"{record.run_id}.json"
    path = reports / folder / name
    write_record(record, path)
    return path


def write_many(reports: Path, number: int, known: Sequence[Check]) -> None:
    """``number`` published records of whole runs of the checks ``known``, an hour apart, of every target in turn."""
    texts = []
    for target in known_targets():
        name = target.target
        kind = "emulated" if name == "emulated" else "hardware"
        results = [
            result(
                one.id, evidence=kind, gate=one.spec.gate, plan=one.spec.plan, measurements=measured(1e-7, 1e-6) * 2,
                repeat=f"python -m pytest '{one.node}'",
            )
            for one in known
            if one.applies_to(name)
        ]  # fmt: skip
        texts.append((name, record(name, results).model_dump_json(indent=1)))
    for count in range(number):
        name, text = texts[count % len(texts)]
        time = datetime(2026, 5, 1, tzinfo=UTC) + timedelta(hours=count)
        text = text.replace(f'"run-{name}-1"', f'"run-{count:05d}"', 1)
        path = reports / "evidence" / name / f"run-{count:05d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("2026-11-01T00:00:00Z", f"{time:%Y-%m-%dT%H:%M:%SZ}", 1))


def main(root: Path) -> None:
    """Make the tree with a few records in it, to look at reports by hand."""
    reports = write_tree(root) / "reports"
    skipped = result("p8.kernel.ms", "SKIP", code="NO_BASELINE")
    write(record("sm120", [*passing()[:-2], result("p4.triton_pytorch.max", "FAIL")], day=3), reports)
    write(record("sm90", [*passing(), skipped], day=2), reports, "evidence")
    write(record("emulated", passing("emulated"), day=4), reports)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
