"""The declarations in ``phases/`` agree with each other."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

from verify.checks import catalogue
from verify.record.headroom import BY_DESIGN
from verify.tests.tree import REPOSITORY


def test_every_need_is_a_check_that_runs_before() -> None:
    known: set[str] = set()
    dangling = []
    for check in catalogue():
        dangling += [f"{check.id} needs {need}" for need in check.spec.needs if need not in known]
        known |= {check.id, check.spec.family}
    assert dangling == []


def test_a_family_does_not_need_itself() -> None:
    assert [check.id for check in catalogue() if check.spec.family in check.spec.needs] == []


def test_reading_the_catalogue_imports_neither_torch_nor_a_subject() -> None:
    program = "import sys; from verify.checks import catalogue; list(catalogue())"
    program += "; print(sorted({'torch', 'triton', 'transformers', 'vllm', 'triattention'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_check_that_measures_says_what_is_allowed_and_why() -> None:
    silent = set()
    for check in catalogue():
        path, name = check.node.partition("[")[0].split("::")
        test = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
        if "measure" in inspect.signature(test).parameters and not check.spec.tolerance:
            silent.add(check.spec.family)
    assert silent == set()


def test_families_whose_bound_a_correct_result_may_need_all_of_exist() -> None:
    assert {one.spec.family for one in catalogue()} >= BY_DESIGN
