"""The contract: it describes every published name and parameter, and the page of it is up to date."""

from __future__ import annotations

import re

import pytest

from verify.checks import CAPABILITIES, PROFILES
from verify.record.schema import Verdict
from verify.subject import toml
from verify.subject.contract import EVERY, contract, meaning_of, option_meaning, page
from verify.subject.meanings import MEANINGS, OPTIONS, PARAMETERS
from verify.subject.published import CONFIG_DEFAULTS, parameters_of
from verify.subject.scaffold import files
from verify.tests.tree import REPOSITORY


def test_the_page_is_up_to_date() -> None:
    """Write it: ``python -m verify contract --format markdown > docs/contract.md``."""
    assert (REPOSITORY / "docs" / "contract.md").read_text("utf-8") == page()


def test_every_name_has_a_meaning_and_every_meaning_a_name() -> None:
    assert MEANINGS.keys() == {name.full for name in EVERY}
    assert {name.capability for name in EVERY} <= CAPABILITIES.keys()


def test_every_parameter_and_option_has_a_meaning_that_is_used() -> None:
    used = {(name, one) for name in EVERY for one in parameters_of(name.module, name.name)}
    assert all(meaning_of(name, one) for name, one in used)
    options = {option for defaults in CONFIG_DEFAULTS.values() for option in defaults}
    assert all(option_meaning(option) for option in options)
    called = {
        one for about in MEANINGS.values() for signature in about.methods for one in re.findall(r"\w+", signature)
    }
    assert PARAMETERS.keys() <= {one for _, one in used} | options | called


def test_options_that_are_described_are_written_somewhere() -> None:
    # those without a published default are in the stubs only
    written = (
        files("x", "full")["triattention/vllm/core/config.py"]
        + files("x", "full")["triattention/methods/triattention.py"]
    )
    assert [option for option in OPTIONS if f"    {option}: " not in written] == []


def test_the_sections_that_are_named_are_there() -> None:
    there = set(map(int, re.findall(r"^## (\d+)\. ", page(), re.MULTILINE)))
    assert {number for about in MEANINGS.values() for number in about.sections} <= there


def test_profiles_outcomes_and_entries_of_a_subject_file_are_described() -> None:
    text = page()
    assert [profile for profile in PROFILES if f"| `{profile}` |" not in text] == []
    told = text[text.index("| outcome |") : text.index("ABSENT and REFUSED are no accusation")]
    assert [verdict for verdict in Verdict if verdict not in told] == []
    example = text[text.index("```toml") :]
    for model in (toml.About, toml.Offers):
        assert [entry for entry in model.model_fields if not re.search(rf"\b{entry}\b", example)] == []


def test_in_a_terminal_it_has_no_marks(capsys: pytest.CaptureFixture[str]) -> None:
    assert contract("text") == 0
    shown = capsys.readouterr().out
    assert "compute_scores_pytorch(key_states, cache_positions," in shown
    assert not re.search(r"`|\*\*|^#+ |^\| ---", shown, re.MULTILINE)
