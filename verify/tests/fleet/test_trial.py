"""What ``verify gate`` asks of a GPU, with a driver and a record that are made up here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from verify.errors import ConfigurationError, Exit
from verify.fleet import trial
from verify.fleet.contracts import Answer, Outcome
from verify.fleet.trial import UNANSWERING, examine, judged, several
from verify.machine import nvml
from verify.machine.nvml import Driver, NvmlUnavailable
from verify.record.schema import CheckResult, Gpu, Record
from verify.run.levels import GATE
from verify.tests.samples import record, result, waived

H200 = Gpu(name="NVIDIA H200", uuid_sha256="0" * 64, sm=90, memory_gib=139.8, driver="580.1")

Carried = tuple[int, Record | None]


def _driver(*gpus: Gpu, notes: tuple[str, ...] = ()) -> Callable[[], Driver]:
    return lambda: Driver("580.1", "13.0", gpus, notes)


def _examined(carry_out: Callable[[int | None, Path], Carried], **fields: Any) -> Answer:
    given: dict[str, Any] = {"driver": _driver(H200), "users": lambda gpu: 0, "expect": None, **fields}
    return examine(given.pop("expect"), Path("/nowhere"), carry_out=carry_out, **given)


def _never(expect: int | None, folder: Path) -> Carried:
    raise AssertionError("no check may run")


def _level_one(target: str = "sm90", **verdicts: Any) -> Record:
    """A record of the checks of the gate, all passed except those in ``verdicts`` (with ``__`` for a dot)."""
    other = {name.replace("__", "."): fields for name, fields in verdicts.items()}
    evidence = "emulated" if target == "emulated" else "hardware"
    results = [result(name, evidence=evidence, gate="hard") for name in sorted(GATE - other.keys())]
    return record(target, [*results, *filter(None, other.values())])


def _oracle(verdict: str, **fields: Any) -> CheckResult:
    return result("p4.triton_oracle.n1024", verdict, gate="hard", **fields)


def test_all_checks_passed_on_the_gpu() -> None:
    answer = _examined(lambda expect, folder: (Exit.OK, _level_one()), expect=90)
    assert answer.outcome is Outcome.PASS
    assert answer.words.startswith("7 checks passed on sm90 (")
    assert answer.details["checks"].keys() == GATE


def test_a_gpu_that_does_not_answer_is_no_gpu() -> None:
    def unavailable() -> Driver:
        raise NvmlUnavailable("driver/library version mismatch")

    assert _examined(_never, driver=unavailable).outcome is Outcome.NO_GPU
    answer = _examined(_never, driver=_driver(notes=("card 0 cannot be asked (GPU is lost)",)))
    assert (answer.outcome, answer.words) == (Outcome.NO_GPU, "no GPU: card 0 cannot be asked (GPU is lost)")


def test_another_gpu_than_expected_is_named() -> None:
    answer = _examined(_never, expect=120)
    assert (answer.outcome, answer.words) == (Outcome.WRONG_GPU, "sm120 was expected, this is sm90 (NVIDIA H200)")


def test_a_gpu_that_others_use_is_left_alone() -> None:
    assert _examined(_never, users=lambda gpu: 2).outcome is Outcome.BUSY


def test_an_interrupted_run_is_no_verdict_on_the_gpu() -> None:
    assert _examined(lambda expect, folder: (Exit.INTERRUPTED, None)).outcome is Outcome.INTERRUPTED


@pytest.mark.parametrize(
    ("other", "outcome", "words"),
    [
        (_oracle("FAIL", message="too far off"), Outcome.HARD, "n1024 FAIL: too far off"),
        (_oracle("CRASH", message="signal 11"), Outcome.HARD, "n1024 CRASH: signal 11"),
        (_oracle("ERROR", message="a defect"), Outcome.UNJUDGED, "n1024 ERROR: a defect"),
        (_oracle("INFRA", message="ECC"), Outcome.UNJUDGED, "n1024 INFRA: ECC"),
        (_oracle("SKIP", code="PKG_MISSING"), Outcome.UNJUDGED, "n1024 PKG_MISSING"),
        (waived("p4.triton_oracle.n1024", gate="hard"), Outcome.UNJUDGED, "n1024 WAIVED"),
        (None, Outcome.UNJUDGED, "n1024 has no result"),
    ],
    ids=["fail", "crash", "error", "infra", "skip", "waived", "absent"],
)
def test_a_check_that_did_not_pass_decides(other: Any, outcome: Outcome, words: str) -> None:
    answer = judged(_level_one(p4__triton_oracle__n1024=other))
    assert answer.outcome is outcome
    assert words in answer.words


def test_a_soft_failure_is_a_warning() -> None:
    soft = result("p1.toolkit.nvcc", "FAIL", gate="soft", message="nvcc is 12.0")
    whole = _level_one()
    assert judged(whole.model_copy(update={"results": [*whole.results, soft]})).outcome is Outcome.SOFT


def test_an_emulated_run_is_never_a_pass() -> None:
    assert judged(_level_one("emulated")).outcome is Outcome.NO_GPU


@pytest.mark.parametrize(
    "error",
    [ConfigurationError("torch cannot use it"), ModuleNotFoundError("gone", name="pytest"), OSError(28, "full")],
)
def test_a_machine_on_which_the_suite_cannot_start_is_no_wrong_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*given: object, **named: object) -> Answer:
        raise error

    monkeypatch.setattr(trial, "examine", broken)
    trial.main([str(tmp_path), "any", "one"])
    answer = trial.read_answer(tmp_path)
    assert answer is not None
    assert answer.outcome is Outcome.UNJUDGED


def test_several_gpus_are_named_as_they_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert several(_driver(H200)) == []
    assert several(_driver(H200, H200, H200)) == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,9")
    assert several(_driver(H200, H200)) == ["GPU-a", "GPU-b"]


def test_a_machine_that_has_lost_a_card_is_not_right() -> None:
    assert UNANSWERING in Path(nvml.__file__).read_text("utf-8")
    driver = _driver(H200, notes=("card 0 cannot be asked (GPU is lost)",))
    answer = _examined(_never, driver=driver)
    assert (answer.outcome, answer.words) == (Outcome.UNJUDGED, "card 0 cannot be asked (GPU is lost)")
    assert several(_driver(H200, H200, notes=("card 0 cannot be asked (GPU is lost)",))) == []
    # of the other card that --gpu names it says nothing
    alone = _examined(lambda expect, folder: (Exit.OK, _level_one()), driver=driver, whole=False)
    assert alone.outcome is Outcome.PASS
