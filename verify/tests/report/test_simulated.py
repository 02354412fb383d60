"""How simulated evidence looks in every report: apart from the other kinds, and never green."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from verify import cli
from verify.architectures import EMULATED, find, known_targets
from verify.record.schema import EVIDENCE, CheckResult
from verify.record.verdict import assess
from verify.report import documents, export, overview, terminal
from verify.report.looks import LOOKS
from verify.report.matrix import grid, rows
from verify.report.sentences import headline, simulated_words, tally
from verify.report.site.build import build
from verify.report.site.view import across
from verify.tests.report.test_site import site_of
from verify.tests.report.test_verb import printed
from verify.tests.samples import checks, compiled, passing, record, result, simulated, simulation, write

N1, N33 = "p4.oracle.n1", "p4.oracle.n33"
SM120 = find(120)
UNSUPPORTED = {"code": "SIM_UNSUPPORTED", "message": "mma.sync is not executed", "evidence": "simulated"}


def ran(check_id: str, verdict: str = "PASS", evidence: str = "simulated", **fields: object) -> CheckResult:
    return result(check_id, verdict, evidence, **fields)


def of(*results: CheckResult):
    """sm120 with these simulated results, and kernels that were built."""
    return assess(SM120, [simulated("sm120", results, day=2), compiled("sm120")], checks())


def oracle(*records):
    found = assess(SM120, records, checks())
    row = next(one for one in rows(found.cells) if one.spec.family == "p4.oracle")
    return row.verdict, str(next(marks for spec, marks in grid([found]) if spec.family == "p4.oracle")["sm120"])


def test_no_two_classes_look_alike() -> None:
    assert tuple(LOOKS) == EVIDENCE
    for part in ("shape", "style", "meaning"):
        assert len({getattr(one, part) for one in LOOKS.values()}) == len(EVIDENCE)
    assert [kind for kind, one in LOOKS.items() if "green" in one.style] == ["hardware"]


@pytest.mark.parametrize(
    ("results", "words", "mark"),
    [
        ([ran(N1), ran(N33)], "SIMULATED 2", "◐P"),
        ([ran(N1), ran(N33, "FAIL")], "FAIL 1/2", "◐F"),
        ([ran(N1), ran(N33, "SKIP", **UNSUPPORTED)], "SKIP SIM_UNSUPPORTED 1/2", "◐S"),
        # a check that launched no kernel is not simulated, and does not hide one that is
        ([ran(N1), ran(N33, evidence="emulated")], "SIMULATED 1/2", "◐P"),
        ([ran(N1, "FAIL", evidence="emulated")], "NOT RUN 2", "·"),
    ],
)
def test_a_row_says_what_was_simulated(results: list[CheckResult], words: str, mark: str) -> None:
    assert oracle(simulated("sm120", results)) == (words, mark)


def test_simulated_checks_do_not_fill_a_row_that_ran_in_part() -> None:
    part, executed = record("sm120", [result(N1)]), simulated("sm120", [ran(N1), ran(N33)], day=2)
    assert oracle(part, executed) == ("SIMULATED 1/2", "◐P")
    assert oracle(part, simulated("sm120", [ran(N1)], day=2)) == ("NOT RUN 1/2", "·")
    both = simulated("sm120", [ran(N33, "FAIL")], day=2), record("sm120", [result(N1, "FAIL")])
    assert oracle(*both) == ("FAIL 2", "●F")


def test_a_failed_build_is_not_hidden_by_what_was_simulated() -> None:
    built = compiled("sm120", [result(N33, "FAIL", evidence="compiled")])
    assert oracle(built, simulated("sm120", [ran(N1)])) == ("FAIL 1/2", "◆F")


def test_each_class_is_counted_apart() -> None:
    assert tally(of(*passing("simulated"))) == "sm120: built 1/1, simulated 6/6, hardware 0/6"
    assert tally(of(ran(N1), ran(N33, "SKIP", **UNSUPPORTED))) == "sm120: built 1/1, simulated 1/2, hardware 0/6"
    both = [record("sm120", passing()), simulated("sm120", [ran(N1, "FAIL")], day=2)]
    assert tally(assess(SM120, both, checks())) == "sm120: built -, simulated 0/1, hardware 6/6"


def test_the_headline_says_for_which_gpus_the_simulated_checks_pass() -> None:
    records = [
        simulated("sm120", [ran(N1)]),
        simulated("sm90", [ran(N1), ran(N33, "FAIL")]),
        simulated("sm80", [ran(N1)]),
    ]
    told = headline([assess(target, records, checks()) for target in known_targets()])
    assert "; every simulated check passes for sm80 and sm120; simulated checks fail for sm90." in told
    assert told.startswith("0 of 12 GPUs verified on hardware;")


COUNTS = {"census": {"ptx": {"mul": 1, "add": 1}, "sass": {"fma": 1}}}
KERNEL = simulation().kernels[0].model_dump()


def test_a_sentence_says_what_was_simulated_and_what_was_not() -> None:
    assert simulated_words(simulation()) == (
        "1 kernel, 400 launches of PTX compiled by triton 3.7.1; approximations nearest, lowest and highest; "
        "not executed: ptxas, the card"
    )
    others = [
        KERNEL | COUNTS | {"kernel": "rank"},
        KERNEL | {"kernel": "keep", "census": None, "uncounted": "no cubin"},
    ]
    told = simulated_words(simulation(kernels=[KERNEL, *others]))
    assert told.startswith("3 kernels, 1200 launches of PTX")
    assert "; the rounding of rank may differ from the GPU's (its machine code has other floating-point" in told
    assert told.endswith("; the rounding of keep may differ from the GPU's (no cubin)")
    assert "approximations unknown; not executed: unknown" in simulated_words(simulation(modes=[], not_executed=[]))


def test_the_report_on_a_gpu_has_a_line_on_the_simulation() -> None:
    found = of(ran(N1), ran(N33, "FAIL"))
    for text in (printed(terminal.print_report, found, 200), documents.report_markdown(found, ())):
        assert "sm120: built 1/1, simulated 1/2, hardware 0/6\n" in text
        assert "Simulated: 1 kernel, 400 launches of PTX compiled by triton 3.7.1; approximations nearest," in text
    assert "FAIL (simulated, not run) p4.oracle.n33  measured 2" in printed(terminal.print_run, found)
    assert "**p4.oracle.n33** (simulated, not run) measured 2" in documents.report_markdown(found, ())
    assert "simulated  run-sm120-simulated: " in printed(terminal.print_report, found)
    assert "; 1 of them simulated; 1 of them FAILED in the simulator." in printed(terminal.print_report, found, 300)


def test_a_run_names_its_failures_that_no_cell_shows() -> None:
    made = simulated("sm120", [ran(N1), ran(N33, "FAIL", evidence="emulated")])
    text = printed(terminal.print_run, assess(SM120, [made], checks()), 200)
    assert (
        "1 check failed without launching a kernel, the first of them p4.oracle.n33 (measured 2, allowed 1); this"
        in text
    )


@pytest.mark.parametrize("width", [80, 100, 160])
def test_every_table_fits_its_terminal(width: int) -> None:
    mixed = [record("sm120", [result(N1)]), simulated("sm120", [ran(N33, "SKIP", **UNSUPPORTED)], day=2)]
    found = [assess(target, mixed, checks()) for target in known_targets()]
    shown = printed(terminal.print_report, found[-3], width)
    shown += printed(overview.print_summary, found, width) + printed(overview.print_grid, found, width)
    # a command is on one line, however long
    assert max(len(line) for line in shown.splitlines() if "python -m" not in line) <= width
    assert "SIM_UNSUPPORTED" in shown
    assert "◐S" in shown


def test_json_has_each_class_apart() -> None:
    told = json.loads(documents.report_json(of(ran(N1), ran(N33, "FAIL")), ()))
    assert told["simulated"] == {"checks": "1/2", "must_pass": [N1], "failed": [N33]}
    assert (told["must_pass"]["passed"], told["compiled"]["kernels"]) == (0, "1/1")
    assert told["simulation"]["kernels"][0]["launches"] == 400
    assert [run["kind"] for run in told["runs"]] == ["simulated", "compiled"]
    (check,) = (one for row in told["rows"] for one in row["checks"] if one["id"] == N1)
    assert (check["evidence"], check["counts"]) == ("simulated", False)


def test_junit_and_attestation_keep_simulated_results_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("verify.record.verdict.catalogue", checks)
    made = simulated("sm120", [ran(N1), ran(N33, evidence="emulated")])
    suites = {one.get("name"): one for one in ElementTree.fromstring(export.report_junit([of(ran(N1))]))}
    assert len(suites["sm120 simulated: 4 equivalence"]) == 2  # its properties, and one case
    assert suites["sm120: 4 equivalence"].get("errors") == "4"  # every must-pass check, the simulated one too
    assert cli.main(["export", "--junit", str(write(made, tmp_path, "evidence"))]) == 0
    assert [one.get("name") for one in ElementTree.fromstring(capsys.readouterr().out).iter("testcase")] == [N1]
    told = json.loads(export.attestation(made))["predicate"]
    assert (told["result"], told["passedTests"]) == ("FAILED", [N1])
    assert {"name": "evidence", "annotations": {"value": "simulated"}} in told["configuration"]


def test_a_badge_is_never_green_by_simulation() -> None:
    badge = json.loads(export.endpoint(of(*passing("simulated"))))
    assert (badge["message"], badge["color"]) == ("INCOMPLETE 0/6", "lightgrey")


def test_history_and_diff_keep_runs_and_simulations_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))
    for module in ("record.verdict", "report.difference", "explain"):
        monkeypatch.setattr(f"verify.{module}.catalogue", checks)
    nowhere = ran(N33, "FAIL", evidence="emulated")
    made = [record("sm120", passing(), day=1), record("sm120", passing(), day=2)]
    made.append(simulated("sm120", [ran(N1, "FAIL"), nowhere], day=3))
    records = ["--records", str(write(made[0], tmp_path, "evidence").parent)]
    for one in made[1:]:
        write(one, tmp_path, "evidence")
    assert cli.main(["history", *records]) == 0
    lines = [line.split()[:4] for line in capsys.readouterr().out.splitlines()]
    assert ["sm120", "2", "PP", "▁▁"] in lines
    assert ["sm120", "simulated", "1", "F"] in lines
    assert cli.main(["history", "--check", N33, *records]) == 0
    assert "simulated" not in capsys.readouterr().out
    assert cli.main(["history", "--check", N1, *records]) == 0
    assert "◐" in capsys.readouterr().out
    assert cli.main(["diff", "--since", "last-green", "--gpu", "sm120", *records]) == 0
    told = capsys.readouterr().out
    assert "to   run-sm120-2" in told


def test_the_pages_show_simulated_evidence_by_shape_and_in_words(tmp_path: Path) -> None:
    good = simulated("sm120", [ran(N1), ran(N33), ran("p1.nvcc.version", evidence="emulated")])
    bad = simulated("sm90", [ran(N1, "SKIP", **UNSUPPORTED), ran(N33, "FAIL")])
    build(site_of(tmp_path, [good, bad, record("emulated", passing("emulated"))], []), tmp_path / "site")
    told = {
        page: (tmp_path / "site" / page).read_text("utf-8") for page in ("index.html", "gpu/sm90.html", "runs.html")
    }
    for words in (
        "p4.oracle on sm120: SIMULATED, simulated evidence",
        "p4.oracle on sm90: FAIL, simulated evidence, 1/2",
        "p1.nvcc on sm120: NOT RUN, no evidence",
    ):
        assert f'aria-label="{words}' in told["index.html"], words
    assert "simulated: PTX for that GPU, executed without it" in told["index.html"]
    assert '<td class="simulated" data-v="SIMULATED" data-e="simulated">' in told["index.html"]
    assert "sm90: built -, simulated 0/2, hardware 0/6" in told["gpu/sm90.html"]
    assert "This is simulated evidence: the check has not run on sm90." in told["gpu/sm90.html"]
    assert "<td>simulated</td>" in told["runs.html"]
    check = (tmp_path / "site" / "check" / "p4.oracle.html").read_text("utf-8")
    assert "Passes on emulated; fails in the simulator for sm90; passes in the simulator for sm120." in check
    nvcc = (tmp_path / "site" / "check" / "p1.nvcc.html").read_text("utf-8")
    assert "No record has a result of this check." in nvcc


def test_an_emulated_target_is_never_simulated() -> None:
    found = assess(EMULATED, [simulated("sm120", passing("simulated"))], checks())
    assert not any(cell.result for cell in found.cells)
    assert across({}) == "No target has a valid result."
