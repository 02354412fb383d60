"""What counts as a refusal, and who is to blame for an exception."""

import importlib
import sys
from pathlib import Path

import pytest

from verify.errors import Wrong
from verify.files import IMPORT_ROOT
from verify.subject.find import find_subject
from verify.subject.refusal import crash, raised_in, refusal
from verify.subject.subject import Subject

_CODE = """
import torch

class Own(ValueError):
    pass

def raises(error):
    raise error

def own():
    raise Own("not this one")

def by_python():
    return int("three")

def signature():
    return by_python(1)

def by_torch():
    return torch.zeros(3).reshape(2, 2)

def again():
    try:
        return int("three")
    except ValueError:
        raise

def words():
    try:
        return int("three")
    except ValueError as error:
        raise ValueError("a number is needed") from error

def asserts():
    assert False, "never"

def back(call):
    return call()
"""


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    package = tmp_path / "refusing"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "code.py").write_text(_CODE)
    (tmp_path / "subject.toml").write_text('[subject]\npackage = "refusing"\n')
    return find_subject(str(tmp_path), IMPORT_ROOT)


@pytest.fixture
def code(subject: Subject):
    sys.path.insert(0, str(subject.root))
    try:
        yield importlib.import_module("refusing.code")
    finally:
        sys.path.remove(str(subject.root))
        for name in [name for name in sys.modules if name.partition(".")[0] == "refusing"]:
            del sys.modules[name]


def _error(call, *args) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011  any exception is judged here
        call(*args)
    return caught.value


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("no"), NotImplementedError("no")])
def test_a_raise_statement_of_the_subject_is_a_refusal(error: Exception, code, subject: Subject) -> None:
    line = next(i for i, text in enumerate(_CODE.splitlines(), start=1) if text.strip() == "raise error")
    assert refusal(_error(code.raises, error), subject) == f"refusing/code.py:{line}"


@pytest.mark.parametrize("name", ["own", "words"])
def test_the_subject_s_own_words_are_a_refusal(name: str, code, subject: Subject) -> None:
    assert refusal(_error(getattr(code, name)), subject)


@pytest.mark.parametrize("name", ["by_python", "signature", "by_torch", "again", "asserts"])
def test_what_python_or_torch_raises_is_a_crash_of_the_subject(name: str, code, subject: Subject) -> None:
    error = _error(getattr(code, name))
    assert refusal(error, subject) == ""
    assert raised_in(error, subject, ()).startswith("refusing/code.py:")


def test_a_crash_is_told_with_its_line_and_nothing_else_is_a_crash(code, subject: Subject) -> None:
    error = _error(code.by_torch)
    assert (
        crash(error, subject)
        == f"the subject raised {type(error).__name__} at {raised_in(error, subject, ())}: {error}"
    )
    for other in (_error(code.own), Wrong("wrong", "a cause"), ValueError("the suite's")):
        assert crash(other, subject) == ""


@pytest.mark.parametrize("error", [KeyError("no"), RuntimeError("no"), IndexError("no"), AssertionError("no")])
def test_other_exceptions_are_no_refusals(error: Exception, code, subject: Subject) -> None:
    assert refusal(_error(code.raises, error), subject) == ""


def test_what_the_suite_raises_inside_a_call_of_the_subject_is_the_suite_s(code, subject: Subject) -> None:
    here = (Path(__file__).parent,)

    def suite() -> None:
        raise ValueError("the suite's")

    error = _error(code.back, suite)
    assert refusal(error, subject) == ""
    assert raised_in(error, subject, here) == ""


def test_a_frame_that_only_watches_the_subject_does_not_clear_it(code, subject: Subject) -> None:
    from verify.judge.guarded import call

    error = _error(call, code.by_torch, {})
    assert raised_in(error, subject, (IMPORT_ROOT / "verify",)).startswith("refusing/code.py:")
