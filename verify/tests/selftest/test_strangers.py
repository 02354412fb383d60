"""Two implementations of strangers under the instrument: a scorer with fixed offsets, and a ranker without scores."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from verify.files import IMPORT_ROOT
from verify.record.reading import read_record
from verify.record.schema import Record, Verdict
from verify.record.verdict import TargetVerdict, assess_record
from verify.run.runner import exit_code

_STRANGERS = IMPORT_ROOT / "verify" / "tests" / "strangers"


def _judged(subject: Path, out: Path) -> tuple[int, Record]:
    """The exit code of a run of phases 2 and 4, and its record."""
    options = ["--device=cpu", f"--subject={subject}", "--phases=2,4", f"--out={out}"]
    child = subprocess.run(
        [sys.executable, "-m", "verify", "run", *options],
        cwd=IMPORT_ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    (path,) = out.glob("*/record.json")
    assert child.returncode in (0, 1), child.stdout + child.stderr
    return child.returncode, read_record(path)


@pytest.mark.parametrize(
    ("name", "capability", "words"),
    [
        (
            "fixed",
            "scoring without Triton",
            ("class A", "(17 fixed offsets)", "aggregation=max: refused", "style=interleaved: refused"),
        ),
        ("ranker", "ranking", ("8 of 8", "dtype=bfloat16: refused")),
    ],
)
def test_a_stranger_is_judged_by_what_it_offers(
    name: str, capability: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    code, record = _judged(_STRANGERS / name, tmp_path)
    accused = [f"{one.id}: {one.message}" for one in record.results if one.verdict in (Verdict.FAIL, Verdict.ERROR)]
    assert accused == []
    assert record.findings == []
    found = assess_record(record)
    assert (code, found.verdict) == (0, TargetVerdict.EMULATED_INCOMPLETE)
    assert all(word in found.capabilities[capability] for word in words), found.capabilities
    passed, judged = found.capabilities[capability].partition(" of ")[::2]
    assert passed.split()[-1] == judged.split()[0].rstrip(";")
    assert found.capabilities["compressor"] == "not offered"
    # a scorer must take max and the options too
    asked_for = {"scorer": 1, "full": 1}
    assert {one: exit_code(record.results, "emulated", one) for one in asked_for} == asked_for
    assert "judged by what it offers" in found.sentence


@pytest.mark.parametrize(
    ("name", "before", "after", "caught"),
    [
        ("fixed", "w * (a - abs(m))", "w * a", "p4_equivalence.py::test_pytorch_oracle[n33]"),
        ("fixed", ".mean(0)", ".max(0)", "p4_properties.py::test_shift[pytorch]"),
        ("ranker", ".max(2)", ".mean(2)", "p4_ranking.py::test_ranking[grouped]"),
    ],
)
def test_a_planted_error_of_a_stranger_is_found(
    name: str, before: str, after: str, caught: str, tmp_path: Path
) -> None:
    copy = tmp_path / name
    shutil.copytree(_STRANGERS / name, copy)
    (source,) = (path for path in copy.rglob("*.py") if before in path.read_text())
    source.write_text(source.read_text().replace(before, after))
    command = [sys.executable, "-m", "pytest", f"phases/{caught}", "--device", "cpu", "--subject", str(copy)]
    child = subprocess.run(
        [*command, "--scratch", str(tmp_path / "scratch"), "-q"],
        cwd=IMPORT_ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert child.returncode == 1, child.stdout + child.stderr
    assert "1 failed" in child.stdout
    assert "measured" in child.stdout


def test_a_stranger_is_never_asked_for_what_it_says_it_does_not_take(tmp_path: Path) -> None:
    copy = tmp_path / "declared"
    shutil.copytree(_STRANGERS / "fixed", copy)
    source = copy / "stranger" / "scorer.py"
    ignored = 'if style != "half":\n        raise NotImplementedError("only the half layout")\n'
    assert ignored in source.read_text()
    source.write_text(source.read_text().replace(ignored, ""))  # an interleaved call would get wrong scores
    with (copy / "subject.toml").open("a") as file:
        file.write('style = ["half"]\n')
    command = [sys.executable, "-m", "pytest", "phases/p4_properties.py::test_layout[pytorch]", "--device", "cpu"]
    child = subprocess.run(
        [*command, "--subject", str(copy), "--scratch", str(tmp_path / "scratch"), "-q", "-rs"],
        cwd=IMPORT_ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout + child.stderr
    assert "REFUSED: style=interleaved: not offered" in child.stdout
