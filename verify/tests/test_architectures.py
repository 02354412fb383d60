from __future__ import annotations

import pytest

from verify.architectures import ARCHITECTURES, EMULATED, find, known_targets, parse_target
from verify.errors import ConfigurationError


@pytest.mark.parametrize("name", ["sm120", "SM120", "sm_120", "SM_120", "120", "12.0", " sm120 "])
def test_every_spelling_names_the_same_gpu(name: str) -> None:
    assert parse_target(name) is find(120)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.target)
def test_target_and_capability_are_read_back(architecture) -> None:
    assert parse_target(architecture.target) is architecture
    assert parse_target(architecture.capability) is architecture


def test_emulated_is_a_target_but_no_gpu() -> None:
    assert parse_target("emulated") is EMULATED
    assert known_targets()[-1] is EMULATED


def test_architectures_are_ascending_and_none_is_invented() -> None:
    assert [a.sm for a in ARCHITECTURES] == [80, 86, 87, 88, 89, 90, 100, 103, 107, 110, 120, 121]
    assert [a.sm for a in ARCHITECTURES if a.toolchain_gap] == [88]


@pytest.mark.parametrize("name", ["sm999", "banana", "sm75", "", "12", "12.00", "sm-120", "sm120a", "120.0"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"use one of sm80, .*sm121, emulated") as caught:
        parse_target(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["sm101", "10.1", "101"])
def test_a_renamed_architecture_is_refused_with_its_new_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match="sm101 was renamed to sm110"):
        parse_target(name)
