"""``run --confirm`` and ``run --beside``: runs with records that change no verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verify.tests.tree import Tree, make_tree

#: One check fails always, one only at first; a SOFT one fails too.
_FAILS = """
from pathlib import Path

@check("p1.always", gate="hard", cases={"good": 0, "bad": 1}, **WORDS)
def test_always(case): assert not case, "wrong"

@check("p1.first", gate="hard", cases="one", **WORDS)
def test_first(case):
    mark = Path("tried")
    tried = mark.exists()
    mark.touch()
    assert tried, "wrong once"

@check("p1.soft", gate="soft", cases="one", **WORDS)
def test_soft(case): assert False, "wrong"
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = make_tree(tmp_path_factory.mktemp("repository"))
    tree.write_phase(1, _FAILS)
    assert tree.verify("run", "--device", "cpu", "--seed", "7").returncode == 1
    return tree


def _target(tree: Tree, *options: str) -> dict:
    return json.loads(tree.verify("report", "--gpu", "emulated", "--format", "json", *options).stdout)


def test_the_hard_failures_are_tried_again_and_nothing_else(tree: Tree) -> None:
    (first,) = tree.records()
    before = _target(tree)
    again = tree.verify("run", "--confirm", first.run_id)
    assert again.returncode == 1, again.stderr
    record = tree.records()[-1]
    assert {one.id: one.verdict for one in record.results} == {"p1.always.bad": "FAIL", "p1.first.one": "PASS"}
    assert (record.confirms, record.seed, record.selection) == (first.run_id, 7, f"--confirm {first.run_id}")
    # the first result stays, in the verdict and in every comparison
    assert _target(tree) == before
    assert "nothing comparable" in tree.verify("diff", "--since", "last-green").stdout
    explained = tree.verify("explain", "p1.first").stdout
    assert ("FAIL" in explained, "PASS" in explained) == (True, False)
    exported = tree.verify("export", record.run_id, "--attestation")
    assert exported.returncode == 3
    assert f"confirms {first.run_id}, and counts for no verdict; name the run itself" in exported.stderr
    refused = tree.verify("run", "--confirm", record.run_id, "--seed", "8")
    assert "--confirm keeps the options of the original run; drop --seed" in refused.stderr
    assert refused.returncode == 3


def test_a_run_beside_the_others_is_shown_and_merged_with_none(tree: Tree) -> None:
    before = _target(tree)
    assert tree.verify("run", "--device", "cpu", "--beside", "newest").returncode == 1
    assert tree.records()[-1].beside == "newest"
    assert _target(tree) == before
    told = " ".join(tree.verify("report").stdout.split())
    assert "Next to the others: newest, emulated: EMULATED FAIL" in told
    assert "p1.always.bad" in told


def test_a_run_without_a_hard_failure_has_nothing_to_confirm(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    tree.write_phase(1, _FAILS.replace("not case", "True").replace("tried, ", "True, "))
    assert tree.verify("run", "--device", "cpu").returncode == 0
    (record,) = tree.records()
    refused = tree.verify("run", "--confirm", record.run_id)
    assert refused.returncode == 3
    assert f"run {record.run_id} has no HARD failure to confirm" in refused.stderr
    assert len(tree.records()) == 1
