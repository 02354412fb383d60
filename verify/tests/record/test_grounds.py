"""What results rest on: what is noted of it, and that a change of any file makes stale what it could have changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from verify.architectures import EMULATED
from verify.build import builder
from verify.checks import catalogue
from verify.record.archive import load, newest_first, newest_runs
from verify.record.grounds import BUNDLED, NEUTRAL, Checkout, environment, is_neutral
from verify.record.schema import Record
from verify.record.verdict import assess
from verify.tests.tree import REPOSITORY

TABLE = REPOSITORY / "verify" / "tests" / "stale.toml"
HERE = Checkout(REPOSITORY, REPOSITORY, REPOSITORY / "triattention")


def test_the_modules_that_a_file_of_checks_imports_are_found_to_the_last() -> None:
    found = HERE.closure("phases/p4_equivalence.py")
    assert {
        "phases/p4_equivalence.py",
        "verify/judge/tolerance.py",
        "verify/judge/oracle.py",
        "verify/subject/subject.py",
    } <= found
    assert not [name for name in found if is_neutral(name) or name.startswith("phases/p5")]


def test_a_module_that_runs_in_a_process_of_its_own_counts_as_imported() -> None:
    assert {"verify/build/compiler.py", "verify/build/capture.py", "verify/build/control.py"} <= HERE.closure(
        "verify/build/builder.py"
    )


def test_every_module_that_builds_kernels_decides_what_is_kept() -> None:
    names = {
        name.removeprefix("verify/") for name in HERE.closure("verify/build/compiler.py", "verify/build/capture.py")
    }
    assert {name for name in names if name.startswith(("build/", "subject/launches"))} <= {*builder._OWN}


def test_what_is_neutral_is_there() -> None:
    of_a_wheel = {"verify/data/"}
    assert [name for name in NEUTRAL - of_a_wheel if not (REPOSITORY / name).exists()] == []


def test_a_file_goes_by_its_place_and_compiled_code_by_its_source(tmp_path: Path) -> None:
    assert (
        HERE.name_of(REPOSITORY / "verify" / "judge" / "__pycache__" / "oracle.cpython-311.pyc")
        == "verify/judge/oracle.py"
    )
    assert HERE.name_of(REPOSITORY / "triattention" / "kernels.py") == "subject/triattention/kernels.py"
    assert HERE.name_of(REPOSITORY / "verify" / "tests" / "tree.py") is None
    assert HERE.name_of(tmp_path / "verify" / "oracle.py") is None
    plain = REPOSITORY / "verify" / "examples" / "plain"
    other = Checkout(REPOSITORY, plain, plain / "triattention")
    assert other.name_of(plain / "triattention" / "kernels.py") == "subject/triattention/kernels.py"
    # as it lies behind a link
    (tmp_path / "link").symlink_to(REPOSITORY)
    assert HERE.name_of(tmp_path / "link" / "phases" / "p5_trig_cache.py") == "phases/p5_trig_cache.py"


def test_a_module_in_a_folder_is_among_what_results_may_rest_on(tmp_path: Path) -> None:
    (tmp_path / "phases" / "deeper").mkdir(parents=True)
    (tmp_path / "phases" / "deeper" / "data.json").write_text("1")
    assert "phases/deeper/data.json" in Checkout(tmp_path).everything()


def _opened(tmp_path: Path, program: str, **more: str) -> set[str]:
    """The files below ``tmp_path / "package"`` that a process notes."""
    log = tmp_path / "log"
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, **environment(log, tmp_path, tmp_path / "package", {"PYTHONPATH": str(tmp_path)}), **more},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return {os.path.relpath(line, tmp_path / "package") for line in log.read_text().splitlines()}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    for name, text in (("__init__.py", ""), ("one.py", "value = 1"), ("two.py", "value = 2"), ("data.txt", "3")):
        (tmp_path / "package" / name).write_text(text)
    return tmp_path


def test_modules_and_data_are_noted_in_every_child(package: Path) -> None:
    inner = "import package.two, os; open('package/data.txt').close(); os.kill(os.getpid(), 9)"
    program = f"import package.one, subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    sources = {"__init__.py", "one.py", "two.py", "data.txt"}
    assert _opened(package, program) >= sources
    # the second time from compiled code
    named = (
        Checkout(package, package, package / "package").name_of(package / "package" / n)
        for n in _opened(package, program)
    )
    assert {f"subject/package/{name}" for name in sources} <= set(named)


def test_a_fork_notes_and_a_sitecustomize_behind_ours_is_imported(package: Path) -> None:
    (package / "sitecustomize.py").write_text("import os; os.environ['THEIRS'] = 'imported'")
    program = (
        "import os\nif not os.fork():\n    import package.two\n    os._exit(0)\nos.wait()\nassert os.environ['THEIRS']"
    )
    assert "two.py" in " ".join(_opened(package, program))


def _run_of_this_state() -> Record:
    """The newest run of every phase that was made of the files as they are, which ``make test`` makes before the tests;
    else the newest published one, if it knows the same files.
    """
    local = newest_runs(REPOSITORY / "reports" / "runs")
    current = (one for one in local if all(HERE.sha256(name) == digest for name, digest in one.sources.items()))
    published = newest_first(load([REPOSITORY / "reports" / "evidence" / "emulated"]).records)
    known = (one for one in published if all(HERE.sha256(name) for name in one.sources))
    for record in (*current, *known):
        covered = {result.id[1] for result in record.results} >= set("1234567")
        if covered and record.rests_on and record.state == "complete" and record.subject.source == BUNDLED:
            return record
    raise AssertionError("there is no whole run of this state; make one first: python -m verify run --device cpu")


def _families(ids: Iterable[str], everything: Iterable[str]) -> str:
    """Families of checks in few words: those of a phase that is stale as a whole by the number of the phase."""
    found, known = ({check_id.rpartition(".")[0] for check_id in some} for some in (ids, everything))
    told: list[str] = []
    for phase in sorted({family.partition(".")[0] for family in found}):
        whole = sorted(family for family in known if family.startswith(f"{phase}."))
        mine = sorted(family for family in found if family.startswith(f"{phase}."))
        told += [phase] if mine == whole else mine
    return " ".join(told)


def stale_by_file(copy: Path, record: Record) -> Mapping[str, str]:
    """What an edit of each file of a copy makes stale, and of no other."""
    results = [result.model_copy(update={"evidence": "emulated"}) for result in record.results]
    # as if it had been made of the copy as it is
    now = Checkout(copy, copy, copy / "triattention")
    sources = {name: digest for name in record.sources if (digest := now.sha256(name))}
    record = record.model_copy(update={"sources": sources, "results": results})
    checks, found = list(catalogue()), {}
    for folder in ("verify", "phases", "triattention"):
        for path in sorted((copy / folder).rglob("*")):
            if not path.is_file() or "__pycache__" in path.parts or "tests" in path.parts:
                continue
            before = path.read_bytes()
            path.write_bytes(before + b"\n# harmless\n")
            assessment = assess(EMULATED, [record], checks, Checkout(copy, copy, copy / "triattention", suite=copy))
            path.write_bytes(before)
            gone = [cell.check.id for cells in assessment.outdated.values() for cell in cells]
            ran = [cell.check.id for cell in assessment.cells if cell.result or cell.stale]
            found[path.relative_to(copy).as_posix()] = _families(gone, ran)
    return found


def _table(folder: Path) -> dict[str, str]:
    copies = ("verify", "phases", "triattention")
    for name in copies:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "tests"))
    return {name: gone for name, gone in stale_by_file(folder, _run_of_this_state()).items() if gone}


def test_an_edit_of_a_file_makes_stale_what_the_table_says(tmp_path: Path) -> None:
    assert _table(tmp_path) == tomllib.loads(TABLE.read_text("utf-8"))


def test_what_only_asks_runs_keeps_or_shows_makes_nothing_stale_and_the_oracle_every_number() -> None:
    table = tomllib.loads(TABLE.read_text("utf-8"))
    assert not table.keys() & {
        "verify/cli.py",
        "verify/report/terminal.py",
        "verify/report/site/view.py",
        "verify/run/runner.py",
    }
    assert table["verify/judge/oracle.py"] == "p1 p3 p4 p5 p6 p7"
    assert table["triattention/vllm/runtime/compaction.py"] == table["phases/p7_vllm.py"] == "p7"
    assert not [name for name, gone in table.items() if name.startswith("triattention/cli/") and "p4" in gone]


def main() -> None:
    """Print the table, to be read and kept."""
    print("# What an edit of each file makes stale, by family of checks, or by phase where that is all of it.")
    print("# python -m verify.tests.record.test_grounds prints it, from the newest run of this state.")
    with tempfile.TemporaryDirectory() as folder:
        for name, gone in _table(Path(folder)).items():
            print(f'"{name}" = "{gone}"')


if __name__ == "__main__":
    main()
