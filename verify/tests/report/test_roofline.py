"""What limits the scoring kernel: predictions from machine code, and what was measured on a GPU."""

from __future__ import annotations

import re

from phases.p8_latency import test_latency as latency
from verify.architectures import known_targets
from verify.checks import Check, CheckSpec
from verify.judge.variants import FULL, PLAN, SCORING
from verify.record.schema import CheckResult, Measurement, Record
from verify.record.verdict import assess
from verify.report.site.page import Frame
from verify.report.site.roofline import _TIMED, CARDS, bytes_per_key, roofline
from verify.report.site.view import Column
from verify.tests.samples import checks, compiled, counted, record, result

MEAN, MAX = "bfloat16-half-mean-d128-o17", "bfloat16-half-max-d128-o17"
TIMED = Check("p8.kernel.latency", "latency", CheckSpec(
    "p8.kernel", "soft", "claim", "reason", "remedy", {"latency": None}
), "phases/x.py::test[latency]")  # fmt: skip


def timed(bandwidth: float, evidence: str = "hardware") -> CheckResult:
    numbers = [("time per call", 21.5, float("inf"), "us"), ("keys read per second", 1200, bandwidth, "GB/s")]
    measurements = [Measurement(name=n, measured=m, allowed=a, unit=u) for n, m, a, u in numbers]
    return result("p8.kernel.latency", evidence=evidence, gate="soft", measurements=measurements)


def section(*found: Record) -> str:
    """The words of the section, with its pictures left out."""
    known = [*(one for one in checks() if one.spec.family != "p8.kernel"), TIMED]
    columns = [Column(assess(target, found, known)) for target in known_targets()]
    page = Frame(len(found), found[0], ()).renderer(in_short="")
    text = page("resources.html", metrics=[], gaps=[], roofline=roofline(columns))
    kept = re.search(r'<section id="roofline">.*?</section>', text, re.DOTALL)
    return " ".join(re.sub(r"<svg.*?</svg>|<[^>]*>", " ", kept[0], flags=re.DOTALL).split()) if kept else ""


def test_the_bytes_of_a_key_are_those_of_the_variants_own_shape() -> None:
    for variant, shape in FULL.items():
        size = {"bfloat16": 2, "float16": 2, "float32": 4}[shape.dtype]
        assert bytes_per_key(variant) == (None if variant in PLAN else size * shape.d + 4 * shape.g), variant


def test_the_timed_cases_are_the_variants_that_they_are_compared_with() -> None:
    (spec,) = (mark.args[0] for mark in latency.pytestmark if mark.name == "check")
    assert {spec.id_of(case) for case in spec.cases} == _TIMED.keys()
    for name, variant in _TIMED.items():
        timed_shape, shape = spec.cases[name.rpartition(".")[2]], SCORING[variant]
        for field in ("d", "g", "dtype", "style", "aggregation", "offsets", "cached"):
            assert getattr(timed_shape, field) == getattr(shape, field), (name, field)


def test_every_card_has_its_rates_from_a_source_and_one_target() -> None:
    assert [(card.target, round(card.ridge, 2)) for card in CARDS] == [("sm80", 0.39), ("sm89", 1.28), ("sm120", 0.92)]
    assert all(card.source.startswith("https://") for card in CARDS)


def test_a_variant_is_limited_by_what_takes_longer_and_only_where_both_rates_are_known() -> None:
    numbers = {MEAN: 31.2, MAX: 187.2, "float32-half-mean": None, "as_written": 30.0}
    told = section(counted("sm80", numbers), counted("sm90", numbers))
    assert "On the A100 40 GB memory limits 1 variant and instructions 1. A GPU without a bar" in told
    assert f"{MEAN} 260 0.120 0.120 {MAX} 260 0.720 54% 0.720 No valid result" in told
    assert "float32-half-mean" not in told
    assert "H100" not in told


def test_a_latency_of_a_gpu_is_shown_as_a_share_of_the_cards_own_bandwidth() -> None:
    ran = [record("sm90", [timed(4800.0)], day=2), record("sm120", [timed(float("inf"))])]
    told = section(counted("sm90", {MEAN: 31.2}), *ran)
    head, _, rows = told.partition("Measured on GPUs")
    assert "nothing here is measured" not in head
    assert "p8.kernel.latency sm90, Sample GPU 90 hardware 21.5 us 1200 GB/s 4800 GB/s 25% 0.120" in rows
    assert "p8.kernel.latency sm120, Sample GPU 120 hardware 21.5 us 1200 GB/s unknown - -" in rows


def test_only_a_gpu_is_measured_and_without_any_number_there_is_no_section() -> None:
    assert section(record("emulated", [timed(4800.0, "emulated")]), compiled("sm90")) == ""
