from __future__ import annotations

import json

import pytest

from verify.fleet.contracts import CODES, CONTRACTS, WIDTH, Answer, Outcome, code, told
from verify.tests.samples import REPOSITORY

#: The exit code and the beginning of the line of every outcome in every contract.
TABLE = {
    (Outcome.PASS, None): (0, "OK triattention: "),
    (Outcome.PASS, "npd"): (0, "OK triattention: "),
    (Outcome.PASS, "nagios"): (0, "TRIATTENTION OK - "),
    (Outcome.PASS, "aicr"): (0, "OK triattention: "),
    (Outcome.PASS, "hv"): (0, "PASS"),
    (Outcome.PASS, "slurm"): (0, "triattention: "),
    (Outcome.SOFT, None): (0, "WARNING triattention: "),
    (Outcome.SOFT, "npd"): (0, "WARNING triattention: "),
    (Outcome.SOFT, "nagios"): (1, "TRIATTENTION WARNING - "),
    (Outcome.SOFT, "aicr"): (0, "WARNING triattention: "),
    (Outcome.SOFT, "hv"): (0, "WARNING"),
    (Outcome.SOFT, "slurm"): (0, "triattention: "),
    (Outcome.HARD, None): (1, "CRITICAL triattention: "),
    (Outcome.HARD, "npd"): (1, "CRITICAL triattention: "),
    (Outcome.HARD, "nagios"): (2, "TRIATTENTION CRITICAL - "),
    (Outcome.HARD, "aicr"): (1, "CRITICAL triattention: "),
    (Outcome.HARD, "hv"): (1, "CRITICAL"),
    (Outcome.HARD, "slurm"): (1, "[node_problem] triattention: "),
    **{
        (outcome, contract): told
        for outcome in (Outcome.NO_GPU, Outcome.WRONG_GPU, Outcome.BUSY, Outcome.UNJUDGED)
        for contract, told in {
            None: (3, "UNKNOWN triattention: "),
            "npd": (3, "UNKNOWN triattention: "),
            "nagios": (3, "TRIATTENTION UNKNOWN - "),
            "aicr": (2, "UNKNOWN triattention: "),
            "hv": (1, "UNKNOWN"),
            "slurm": (3, "[node_problem] triattention: "),
        }.items()
    },
    **{
        (outcome, contract): told
        for outcome in (Outcome.INTERRUPTED, Outcome.TIMEOUT)
        for contract, told in {
            None: (3, "UNKNOWN triattention: "),
            "npd": (3, "UNKNOWN triattention: "),
            "nagios": (3, "TRIATTENTION UNKNOWN - "),
            "aicr": (2, "UNKNOWN triattention: "),
            "hv": (2, "UNKNOWN"),
            "slurm": (3, "[node_problem] triattention: "),
        }.items()
    },
    (Outcome.CONFIGURATION, None): (3, "UNKNOWN triattention: "),
    (Outcome.CONFIGURATION, "npd"): (3, "UNKNOWN triattention: "),
    (Outcome.CONFIGURATION, "nagios"): (3, "TRIATTENTION UNKNOWN - "),
    (Outcome.CONFIGURATION, "aicr"): (2, "UNKNOWN triattention: "),
    (Outcome.CONFIGURATION, "hv"): (2, "UNKNOWN"),
    (Outcome.CONFIGURATION, "slurm"): (3, "[user_problem] triattention: "),
}


def test_the_table_has_a_row_for_every_outcome_of_every_contract() -> None:
    assert {*TABLE} == {(outcome, contract) for outcome in Outcome for contract in (None, *CONTRACTS)}


@pytest.mark.parametrize(("outcome", "contract"), TABLE)
def test_each_outcome_has_the_code_and_the_line_that_the_contract_expects(
    outcome: Outcome, contract: str | None
) -> None:
    expected, start = TABLE[outcome, contract]
    said = told(contract, Answer(outcome, "a sentence", {"target": "sm90"}))
    assert code(contract, outcome) == expected
    if contract == "hv":
        content = json.loads(said)
        assert (content["overall_severity"], content["message"]) == (start, "a sentence")
        assert content["triattention"] == {"outcome": outcome.value, "target": "sm90"}
    else:
        assert said == f"{start}a sentence"


@pytest.mark.parametrize("contract", CODES)
def test_only_a_gpu_that_passed_ends_with_0(contract: str) -> None:
    assert [outcome for outcome in Outcome if CODES[contract][outcome] == 0] in (
        [Outcome.PASS],
        [Outcome.PASS, Outcome.SOFT],
    )


@pytest.mark.parametrize("contract", [None, *(one for one in CONTRACTS if one != "hv")])
def test_a_line_is_one_line_of_at_most_80_characters(contract: str | None) -> None:
    said = told(contract, Answer(Outcome.HARD, "p4.triton_oracle.n1024 FAIL:\n\x1b[31mtoo far off\x1b[0m " * 20))
    assert len(said) == WIDTH
    assert said.isprintable()


def test_the_documents_have_the_table_as_it_is() -> None:
    text = (REPOSITORY / "docs" / "fleet.md").read_text("utf-8")
    for outcome in Outcome:
        codes = " | ".join(str(CODES[contract][outcome]) for contract in CODES)
        assert f"| {outcome.value} | {codes} |\n" in text
