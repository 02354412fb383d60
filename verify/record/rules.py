"""The rules that one record must satisfy; they trust none of its own claims."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from verify.architectures import parse_target
from verify.checks import Check
from verify.errors import ConfigurationError
from verify.record.grounds import BUNDLED
from verify.record.schema import BLOCKING, FAILING, NOT_OFFERED
from verify.record.without_gpu import Found, Json, bad_digest, builds, kind_of, simulation, without_gpu

#: A record cannot be older than the method it tests, or newer than now plus the error of a clock.
_FIRST, _CLOCK_SKEW = datetime(2026, 4, 1, tzinfo=UTC), timedelta(hours=1)

#: The most by which the time in a run id may differ from time_utc. A run makes both at once; a compilation makes its id
#: just after.
_ID_AND_TIME = timedelta(minutes=1)

#: Values of fields that were not filled in.
_PLACEHOLDER = re.compile(r"(|-|\?+|x+|n/?a|none|null|unknown|todo|tbd|unset|placeholder|example)", re.IGNORECASE)

_GIT_SHA = re.compile(r"none|[0-9a-f]{40}|[0-9a-f]{64}")

#: The device of a run, by the evidence that it is made for.
_DEVICES = {"hardware": "cuda", "simulated": "sim:{target}", "emulated": "cpu"}


def _identity(record: Json, known: Mapping[str, Check]) -> Found:
    if record["state"] != "complete":
        yield "", f"state is {record['state']!r}; only a complete run proves anything"
    made, now = datetime.fromisoformat(record["time_utc"]), datetime.now(UTC)
    if not _FIRST <= made <= now + _CLOCK_SKEW:
        yield "", f"time_utc {record['time_utc']} is not between {_FIRST:%Y-%m-%d} and now"
    kind = kind_of(record)
    word, more = record["target"] + "-compiled" * (kind == "compiled"), "(?:-simulated)?" * (kind == "simulated")
    match = re.fullmatch(rf"(\d{{8}}T\d{{6}}Z)-{word}{more}-[0-9a-f]{{4}}", record["run_id"])
    if match is None:
        yield "", f"run_id {record['run_id']!r} is not a time, {word} and four hexadecimal digits"
    elif abs(datetime.strptime(match[1], "%Y%m%dT%H%M%S%z") - made) > _ID_AND_TIME:
        yield "", f"run_id {record['run_id']!r} does not have the time of time_utc {record['time_utc']}"
    if not math.isfinite(float(record["duration_s"])):
        yield "", f"duration_s is {record['duration_s']}"
    for name, digest in (
        ("instrument_sha256", record["instrument_sha256"]), ("content_sha256", record["subject"]["content_sha256"]),
        *((f"the digest of {name}", digest) for name, digest in record.get("sources", {}).items()),
    ):  # fmt: skip
        yield from bad_digest(name, digest)
    if not _GIT_SHA.fullmatch(record["subject"]["git_sha"]):
        yield "", f"subject.git_sha {record['subject']['git_sha']!r} is neither a commit nor 'none'"


def _environment(record: Json, known: Mapping[str, Check]) -> Found:
    environment = record["environment"]
    gpu, variables = environment["gpu"], environment["variables"]
    named = {"subject.name": record["subject"]["name"], "subject.version": record["subject"]["version"]}
    named |= {"subject.source": record["subject"]["source"]}
    named |= {name: value for name, value in environment.items() if isinstance(value, str)}
    named |= {f"gpu.{name}": value for name, value in (gpu or {}).items() if isinstance(value, str)}
    named |= {f"ptxas.{name}": value for name, value in environment["ptxas"].items()}
    for name, value in named.items():
        if _PLACEHOLDER.fullmatch(value.strip()):
            yield "", f"{name} is {value!r}, which says nothing"
    for name in ("torch", "triton", "python"):
        if not re.match(r"\d+\.\d+", environment[name]):
            yield "", f"{name} is {environment[name]!r}, but no check runs without it"
    if not re.fullmatch(r"[01]", variables.get("TRITON_DEFAULT_FP_FUSION", "unset")):
        yield (
            "",
            f"TRITON_DEFAULT_FP_FUSION is {variables.get('TRITON_DEFAULT_FP_FUSION', 'unset')!r}; a run sets 0 or 1",
        )
    interpreted = variables.get("TRITON_INTERPRET", "unset") not in ("", "0", "unset")
    if record["target"] == "emulated":
        if gpu is not None:
            yield "", f"target is emulated, but the environment has the GPU {gpu['name']}"
        if not interpreted:
            yield "", "target is emulated, but TRITON_INTERPRET is not set"
        return
    try:
        parse_target(record["target"])
    except ConfigurationError as error:
        yield "", str(error)
    if kind_of(record) in ("compiled", "simulated"):
        yield from (("", problem) for problem in without_gpu(record))
        return
    if gpu is None or f"sm{gpu['sm']}" != record["target"]:
        yield "", f"target is {record['target']}, but the GPU is {gpu and gpu['name']} (sm{gpu and gpu['sm']})"
    else:
        yield from bad_digest("gpu.uuid_sha256", gpu["uuid_sha256"])
    if interpreted:
        yield (
            "",
            f"target is {record['target']}, but TRITON_INTERPRET={variables['TRITON_INTERPRET']} emulated the kernels",
        )
    if "CPU" in environment["cuda_runtime"] or environment["torch"].endswith("+cpu"):
        yield "", f"target is {record['target']}, but torch {environment['torch']} is a CPU build"


def _results(record: Json, known: Mapping[str, Check]) -> Found:
    times = Counter(result["id"] for result in record["results"])
    yield from ((name, f"has {number} results") for name, number in times.items() if number > 1)
    by_id = {result["id"]: result for result in record["results"]}
    for result in record["results"]:
        name = result["id"]
        if (one := known.get(name)) is None:
            yield name, "is not a check of this suite"
            continue
        for found in _declared(result, one, record), _verdict(result, one, by_id), _numbers(result, one):
            yield from ((name, sentence) for sentence in found)


def _declared(result: Json, one: Check, record: Json) -> Iterator[str]:
    """Compare the fields of a result that follow from the catalogue and the record."""
    if result["gate"] != one.spec.gate:
        yield f"gate is {result['gate']}, but the catalogue has {one.spec.gate}"
    if result["plan"] != one.spec.plan:
        yield f"plan is {result['plan']}, but the catalogue has {one.spec.plan}"
    kind = kind_of(record)
    ahead = kind == "compiled"
    # a check that launched no kernel in a simulation says nothing about its target
    fitting = ("simulated", "emulated") if kind == "simulated" else ("compiled",) if one.spec.ahead_of_time else (kind,)
    if result["evidence"] not in fitting:
        yield f"evidence is {result['evidence']}, but must be {' or '.join(fitting)} in this record"
    # the suite's rule, implemented a second time
    seed = int(hashlib.sha256(f"{record['seed']}:{one.id}".encode()).hexdigest()[:8], 16)
    seed = record["seed"] if ahead else seed
    if result["seed"] != seed:
        yield f"seed is {result['seed']}, but seed {record['seed']} of the run makes it {seed}"
    words = shlex.split(result["repeat"])
    # a check may move between files of its phase, and an installed suite names its module; what ran it stays valid
    test = re.escape(one.node[one.node.index("::") :])
    moved = re.compile(rf"phases/p{one.phase}_\w+\.py{test}|(phases\.p{one.phase}\w*){test}")
    found = next(filter(None, map(moved.fullmatch, words)), None)
    named = ["--pyargs"] if found and found[1] else []
    node = found[0] if found else one.node
    needed = ["verify", "compile", "--sm", record["target"].removeprefix("sm")] if ahead else ["pytest", *named, node]
    on = "" if ahead else _DEVICES[kind].format(target=record["target"])
    device = [] if ahead else ["--device", on, "--seed", str(record["seed"])]
    if any(word not in words for word in (*needed, *device)):
        yield f"repeat is {result['repeat']!r}, which does not repeat it: it needs {shlex.join([*needed, *device])}"


def _verdict(result: Json, one: Check, by_id: Mapping[str, Json]) -> Iterator[str]:
    """Whether the other fields fit the verdict."""
    verdict, code, by = result["verdict"], result["code"], result["by"]
    if not math.isfinite(float(result["duration_s"])):
        yield f"duration_s is {result['duration_s']}"
    if verdict == "PASS" and result["message"]:
        yield f"PASS with a message: {result['message'][:80]!r}"
    if verdict in BLOCKING | NOT_OFFERED and not result["message"].strip():
        yield f"{verdict} without a message"
    for name, words in (("aspect", ("REFUSED",)), ("cause", tuple(BLOCKING))):
        if result.get(name) and verdict not in words:
            yield f"{verdict} with the {name} {result[name]!r}"
    if (known := result.get("deviation")) and verdict != "FAIL":
        yield f"{verdict} with the known deviation {known['reason']!r}, which only a FAIL can be"
    if (verdict == "WAIVED") != bool(result.get("waiver")):
        yield f"{verdict} with the waiver {result.get('waiver')}"
    if (verdict == "SKIP") != (code is not None):
        yield f"{verdict} with skip code {code}"
    if code == "NO_GPU" and not (one.spec.needs_gpu and result["evidence"] != "hardware"):
        yield f"SKIP(NO_GPU) with {result['evidence']} evidence of a check that " + (
            "needs a GPU" if one.spec.needs_gpu else "needs no GPU"
        )
    if (verdict == "BLOCKED") != (by is not None):
        yield f"{verdict} by {by}"
    elif verdict == "BLOCKED":
        if not one.spec.needs:
            yield f"BLOCKED by {by}, but the check needs no other check"
        if by not in by_id or by_id[by]["verdict"] not in BLOCKING:
            yield f"BLOCKED by {by}, which is {by_id[by]['verdict'] if by in by_id else 'absent'} here"


def _numbers(result: Json, one: Check) -> Iterator[str]:
    """Whether the numbers agree with the verdict; NaN is outside every bound."""
    # a waived result keeps the message and the numbers of the failure
    failed = result["verdict"] == "WAIVED" and result.get("waiver")
    verdict, outside = (failed or result)["verdict"], []
    for number in result["measurements"]:
        measured, allowed = float(number["measured"]), float(number["allowed"])
        words = f"{number['name']}: measured {measured:.6g}"
        if math.isnan(allowed) or (one.spec.gate == "hard" and math.isinf(allowed)):
            yield f"{words}, allowed {allowed:g}, which is not a bound"
        if not measured <= allowed:
            outside.append(words)
            if verdict in ("PASS", "SKIP", "BLOCKED"):
                yield f"{verdict}, but {words} is outside the allowed {allowed:.6g}"
    if verdict == "PASS" and one.spec.tolerance and not result["measurements"]:
        yield "PASS without a measurement, but the check has a tolerance"
    if verdict == "FAIL" and outside and not any(words in result["message"] for words in outside):
        yield f"FAIL with the message {result['message'][:80]!r}, but the failed measurement is {outside[0]}"
    if verdict == "FAIL" and not outside and ": measured " in result["message"]:
        yield f"FAIL with the message {result['message'][:80]!r}, but every measurement is inside its bound"


def _findings(record: Json, known: Mapping[str, Check]) -> Found:
    """Whether every failure is in one finding, and what a finding blocks is blocked by it."""
    if record["state"] == "running" or record.get("compilation") or "findings" not in record:
        return
    by_id = {result["id"]: result for result in record["results"]}
    members = [name for finding in record["findings"] for name in finding["checks"]]
    yield from ((name, f"is in {number} findings") for name, number in Counter(members).items() if number > 1)
    failing = {name for name, result in by_id.items() if result["verdict"] in FAILING}
    yield from ((name, "failed and is in no finding") for name in sorted(failing - {*members}))
    yield from ((name, "is in a finding, but did not fail") for name in sorted({*members} - failing))
    for finding in record["findings"]:
        for name in finding["blocks"]:
            if by_id.get(name, {}).get("by") not in finding["checks"]:
                yield name, f"is said to be blocked by the finding {finding['cause']!r}, but is not"


def _deviations(record: Json, known: Mapping[str, Check]) -> Found:
    """Whether a failure that is called known could be: by the author of another subject, on the day of the run."""
    for result in record["results"]:
        if not (deviation := result.get("deviation")):
            continue
        if record["subject"]["source"] == BUNDLED:
            yield result["id"], "is called a known deviation, but the bundled subject may have none"
        if deviation["expires"] < record["time_utc"][:10]:
            yield result["id"], f"is called a known deviation until {deviation['expires']}, which was before the run"


def _waivers(record: Json, known: Mapping[str, Check]) -> Found:
    """Whether a failure could be waived: one of the bundled subject, on the day of the run."""
    for result in record["results"]:
        if not (waiver := result.get("waiver")):
            continue
        if record["subject"]["source"] != BUNDLED:
            yield result["id"], "is waived, but only failures of the bundled subject can be"
        if waiver["expires"] < record["time_utc"][:10]:
            yield result["id"], f"is waived until {waiver['expires']}, which was before the run"


def _place(path: Path, record: Json) -> Found:
    """A person would take a record in the folder of another GPU for that GPU's."""
    if re.fullmatch(r"sm\d+", path.parent.name) and path.parent.name != record["target"]:
        yield "", f"target is {record['target']}, but its folder is {path.parent.name}"


def _manifest(path: Path, record: Json) -> Found:
    """Compare the record with the run's frozen request and events, if they are next to it."""
    if path.name != "record.json" or not (path.parent / "run.json").exists():
        return
    try:
        manifest = json.loads((path.parent / "run.json").read_text("utf-8"))
        lines = (path.parent / "events.jsonl").read_text("utf-8").splitlines(keepends=True)
        # NaN and infinities are strings in a record
        events = [json.loads(line, parse_constant=str) for line in lines if line.endswith("\n")]
        selected = [one["id"] for one in manifest["selected"]]
        written = {event["result"]["id"]: event["result"] for event in events if event["event"] == "result"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield "", f"its run.json or events.jsonl cannot be read ({error})"
        return
    if record["run_id"] != path.parent.name:
        yield "", f"run_id is {record['run_id']!r}, but its folder is {path.parent.name}"
    for name in ("run_id", "time_utc", "target", "environment", "instrument_sha256", "seed", "selection"):
        if manifest.get(name) != record[name]:
            yield "", f"{name} differs from its run.json"
    if manifest.get("subject_info") != record["subject"]:
        yield "", "subject differs from its run.json"
    results = {result["id"]: result for result in record["results"]}
    if unasked := [name for name in results if name not in selected]:
        yield unasked[0], "has a result, but run.json did not select it"
    if absent := [name for name in selected if name not in results]:
        yield absent[0], f"is one of {len(absent)} selected checks without a result"
    for name, result in results.items():
        # rests_on is known only after the phase
        if name in selected and result | {"rests_on": None} != written.get(name, {}) | {"rests_on": None}:
            yield name, f"the {result['verdict']} result differs from its events.jsonl"


RULES: tuple[Callable[[Json, Mapping[str, Check]], Found], ...] = (
    _identity, _environment, _results, _findings, _deviations, _waivers, builds, simulation,
)  # fmt: skip


FILE_RULES: tuple[Callable[[Path, Json], Found], ...] = (_place, _manifest)
