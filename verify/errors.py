"""Exit codes, and the exceptions by which a check or a command ends."""

from __future__ import annotations

from enum import IntEnum
from typing import NoReturn

from verify.checks import SKIP_CODES


class Exit(IntEnum):
    """The exit codes of ``python -m verify``; docs/reference.md lists those of each verb."""

    OK = 0
    FAILED = 1  #: a HARD check failed, or the verb found another problem
    INTERRUPTED = 2
    CANNOT = 3  #: the request cannot be carried out, or a check has no verdict because of the machine
    SOFT = 4  #: with --strict-soft, only SOFT checks failed
    UNREADABLE = 5  #: some records could not be read and are missing from the report


class ConfigurationError(Exception):
    """The request cannot be carried out; the message is one sentence with the next step (exit code 3)."""


class InfraError(Exception):
    """The machine, not the subject, is at fault (a broken driver, the wrong GPU): the verdict is INFRA."""


class SubjectLacks(Exception):
    """The subject does not offer what the check asks for: the check is ABSENT; the message is one sentence."""


class SubjectNeeds(Exception):
    """The subject needs a third-party package that is not installed: the check is SKIP(PKG_MISSING)."""


class Wrong(AssertionError):
    """The subject is wrong, and the check knows why: ``cause`` is one short sentence without numbers, and failures with
    the same cause are told as one finding.
    """

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class Refused(Exception):
    """The subject refuses this input by a deliberate ``raise``, and accepts a plainer one: the check is REFUSED.

    ``aspect`` names what it refuses: ``aggregation=max``.
    """

    def __init__(self, message: str, aspect: str = "") -> None:
        super().__init__(message)
        self.aspect = aspect


def skip(code: str, reason: str) -> NoReturn:
    """End the running check as SKIP(``code``); ``reason`` is one sentence for a reader of the matrix.

    Raises ValueError for a code that is not in ``verify.checks.SKIP_CODES``.
    """
    import pytest

    if code not in SKIP_CODES:
        raise ValueError(f"unknown skip code {code!r}; known: {', '.join(SKIP_CODES)}")
    skipped = pytest.skip.Exception(reason)
    skipped.code = code  # type: ignore[attr-defined]  # pytest's exception carries it to the recorder
    raise skipped
