"""Records in the formats of other tools: JUnit XML, in-toto test results, CTRF, Prometheus metrics, and badges."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType

from verify.checks import PHASES
from verify.errors import ConfigurationError
from verify.files import write_out
from verify.record.archive import locate
from verify.record.headroom import room
from verify.record.reading import UnreadableRecord, read_record
from verify.record.schema import FAILING, CheckResult, Record, Verdict
from verify.record.verdict import Assessment, TargetVerdict, assess_record
from verify.report.ctrf import ctrf
from verify.report.looks import place
from verify.report.metrics import prometheus

#: https://github.com/in-toto/attestation/blob/main/spec/predicates/test-result.md
_STATEMENT, _PREDICATE = "https://in-toto.io/Statement/v1", "https://in-toto.io/attestation/test-result/v0.1"

#: Verdicts that are failures in JUnit; the other failing ones are errors.
_FAILURES = frozenset({Verdict.FAIL})

#: Only VERIFIED is green.
_COLOURS = {
    TargetVerdict.VERIFIED: ("brightgreen", "#2e7d32"),
    TargetVerdict.CONFORMS: ("blue", "#1565c0"),
    TargetVerdict.FAILED: ("red", "#c62828"),
    TargetVerdict.EMULATED_FAIL: ("red", "#c62828"),
    TargetVerdict.INFRA: ("orange", "#b35900"),
    TargetVerdict.EMULATED_PASS: ("blue", "#1565c0"),
}
_UNKNOWN = ("lightgrey", "#616161")

#: The width of a badge's letters at 11 px, slightly overestimated so that no text is cut off.
_LETTER_PX, _MARGIN_PX = 7, 10

_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{label}: {message}">
<title>{label}: {message}</title>
<rect width="{left}" height="20" fill="#444"/><rect x="{left}" width="{right}" height="20" fill="{colour}"/>
<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="{label_x}" y="14">{label}</text><text x="{message_x}" y="14">{message}</text>
</g>
</svg>
"""


def export(name: str, form: str, out: Path | None) -> int:
    """Write the record ``name`` as ``junit``, ``attestation``, ``ctrf`` or ``prometheus`` to ``out``, or to stdout;
    return 0.

    Raises ConfigurationError if the record cannot be exported, or the file cannot be written.
    """
    write_out(_FORMS[form](counting(locate(name)[0])), out)
    return 0


def counting(path: Path) -> Record:
    """The record at ``path``, which is to be shown to others as evidence.

    Raises ConfigurationError for a file that is not a record, a made-up one, and one that counts for no verdict.
    """
    try:
        record = read_record(path, unique=True)
    except UnreadableRecord as error:
        raise ConfigurationError(f"{error}; name another record") from error
    if record.apart:
        why = f"confirms {record.confirms}" if record.confirms else f"is only shown as {record.beside}"
        raise ConfigurationError(f"{path} {why}, and counts for no verdict; name the run itself")
    return record


def report_junit(assessments: Iterable[Assessment]) -> str:
    """The valid results of each target, as JUnit XML; a must-pass check without one is an error."""
    return junit(
        (
            one.target.target,
            [cell.result for cell in one.cells if cell.result],
            [c.check.id for c in one.missing if not c.result or c.result.evidence == "simulated"],
        )
        for one in assessments
        if one.used
    )


def junit(targets: Iterable[tuple]) -> str:
    """JUnit XML with a test suite per phase for each ``(target, results)`` or ``(target, results, absent ids)``.

    Simulated results are in suites of their own.
    """
    from junitparser import JUnitXml, TestSuite

    whole = JUnitXml()
    for target, results, *rest in targets:
        for phase, word in PHASES.items():
            cases: dict[str, list] = {}
            for one in results:
                if one.id.startswith(f"p{phase}."):
                    where = place(target, one.evidence)
                    cases.setdefault(where, []).append(_case(one, where))
            absent = [_absent(name, target) for name in (rest[0] if rest else ()) if name.startswith(f"p{phase}.")]
            if absent:
                cases.setdefault(target, []).extend(absent)
            for where, members in cases.items():
                suite = TestSuite(f"{where}: {phase} {word}")
                suite.add_property("target", where)
                suite.add_testcases(members)
                whole.add_testsuite(suite)
    stream = io.BytesIO()
    whole.write(stream, pretty=True)
    return stream.getvalue().decode()


def attestation(record: Record) -> str:
    """The in-toto statement of one record about the tested package, identified by the digest of its content.

    FAILED if a HARD check failed or has no valid result, WARNED if only SOFT ones failed or a failure is waived, else
    PASSED.
    """
    assessment = assess_record(record)
    failed = [cell.check.id for cell in assessment.must_pass if not (cell.passed or cell.waived)]
    soft = (one for one in record.telling if one.gate == "soft" and one.verdict in FAILING)
    warned = [*(one.id for one in soft), *(one.id for one in record.telling if one.verdict is Verdict.WAIVED)]
    passed = [one.id for one in record.telling if one.verdict is Verdict.PASS]
    configuration = {
        "run": record.run_id,
        "target": record.target,
        "evidence": record.kind,
        "instrument": record.instrument_sha256,
        "selection": record.selection,
        "model": record.model,
        "seed": record.seed,
    }
    statement = {
        "_type": _STATEMENT,
        "subject": [
            {
                "name": f"{record.subject.name}@{record.subject.version}",
                "digest": {"sha256": record.subject.content_sha256},
            }
        ],
        "predicateType": _PREDICATE,
        "predicate": {
            "result": "FAILED" if failed else "WARNED" if warned else "PASSED",
            "configuration": [{"name": name, "annotations": {"value": value}} for name, value in configuration.items()]
            + [{"name": "environment", "annotations": record.environment.model_dump(mode="json")}],
            "passedTests": passed,
            "warnedTests": warned,
            "failedTests": failed,
        },
    }
    return json.dumps(statement, indent=1) + "\n"


def endpoint(assessment: Assessment) -> str:
    """The badge of one target as a shields.io endpoint."""
    label, message = _badge(assessment)
    colour = _COLOURS.get(assessment.verdict, _UNKNOWN)[0]
    return json.dumps({"schemaVersion": 1, "label": label, "message": message, "color": colour}, indent=1) + "\n"


def svg(assessment: Assessment) -> str:
    """The badge of one target as an image that needs no server."""
    label, message = map(html.escape, _badge(assessment))
    left, right = (len(text) * _LETTER_PX + _MARGIN_PX for text in (label, message))
    return _SVG.format(
        width=left + right, left=left, right=right, colour=_COLOURS.get(assessment.verdict, _UNKNOWN)[1],
        label=label, message=message, label_x=left / 2, message_x=left + right / 2,
    )  # fmt: skip


def write_badges(assessments: Sequence[Assessment], out: Path) -> None:
    """Write ``<target>.json`` and ``<target>.svg`` to ``out`` for each. Raises ConfigurationError if that fails."""
    for one in assessments:
        write_out(endpoint(one), out / f"{one.target.target}.json")
        write_out(svg(one), out / f"{one.target.target}.svg")


def _badge(assessment: Assessment) -> tuple[str, str]:
    passed = sum(cell.passed for cell in assessment.must_pass)
    return f"TriAttention {assessment.target.target}", f"{assessment.verdict} {passed}/{len(assessment.must_pass)}"


def _case(result: CheckResult, target: str):
    from junitparser import Error, Failure, Properties, Property, Skipped, TestCase

    case = TestCase(result.id, classname=f"{target}.{result.id.rpartition('.')[0]}", time=result.duration_s)
    if result.verdict in FAILING:
        case.result = [(Failure if result.verdict in _FAILURES else Error)(_clean(result.message), result.verdict)]
    elif result.verdict is not Verdict.PASS:
        why = result.code or (f"by {result.by}" if result.by else "")
        told = " ".join(filter(None, (result.verdict, why, result.message)))
        case.result = [Skipped(_clean(told), why or result.verdict)]
    facts = [
        ("verdict", result.verdict),
        ("gate", result.gate),
        ("evidence", result.evidence),
        ("repeat", result.repeat),
    ]
    facts += [("skip code", result.code)] if result.code else []
    facts += [("known deviation", str(result.deviation))] if result.deviation else []
    facts += [("waiver", str(result.waiver))] if result.waiver else []
    for one in result.measurements:
        words = f"measured {one.measured:g}, allowed {one.allowed:g} {one.unit}".strip()
        words += "" if (left := room(one)) is None else f", headroom {left:.3g}"
        facts.append((one.name, words + (f" at {one.where}" if one.where else "")))
    properties = Properties()
    for name, value in facts:
        properties.add_property(Property(_clean(name), _clean(value)))
    case.append(properties)
    return case


def _absent(name: str, target: str):
    from junitparser import Error, TestCase

    case = TestCase(name, classname=f"{target}.{name.rpartition('.')[0]}")
    case.result = [Error("must-pass, but there is no result", "ABSENT")]
    return case


def _clean(text: str) -> str:
    # a message may hold control characters, which XML does not allow
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in str(text))


_FORMS = MappingProxyType(
    {
        "junit": lambda record: junit([(record.target, record.telling)]),
        "attestation": attestation,
        "ctrf": ctrf,
        "prometheus": prometheus,
    }
)
