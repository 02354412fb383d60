"""How a check ends other than by passing or failing."""

from __future__ import annotations

from enum import IntEnum
from typing import NoReturn

from verify.checks import SKIP_CODES


class Exit(IntEnum):
    """The exit codes of ``python -m verify``; each verb says in its help which of them it has."""

    OK = 0
    FAILED = 1  #: a HARD check failed, or what else the verb looked for is wrong
    INTERRUPTED = 2
    CANNOT = 3  #: what was asked for cannot be done, or the machine kept a check from a verdict
    SOFT = 4  #: with --strict-soft, only SOFT checks failed
    UNREADABLE = 5  #: the report was made without the records that could not be read


class ConfigurationError(Exception):
    """The user asked for something that cannot be done; the message is one sentence with the next step (exit 3)."""


class InfraError(Exception):
    """The machine, not the subject, is at fault (a broken driver, the wrong card): the verdict is INFRA."""


#: What Python raises where code goes wrong by itself, or lacks what it was asked for; every other error is a refusal
#: that somebody wrote. A KeyError is one: it names what is not there.
CRASHES = (AssertionError, AttributeError, IndexError, NameError, NotImplementedError, RecursionError, TypeError)


class SubjectLacks(AssertionError):
    """The subject does not have a name that the check needs: a FAIL of that check, in one sentence."""


def skip(code: str, reason: str) -> NoReturn:
    """End the running check as SKIP(``code``); ``reason`` is one sentence for the person who reads the matrix.

    Raises ValueError for a code that ``verify.checks.SKIP_CODES`` does not have.
    """
    import pytest

    if code not in SKIP_CODES:
        raise ValueError(f"unknown skip code {code!r}; known: {', '.join(SKIP_CODES)}")
    skipped = pytest.skip.Exception(reason)
    skipped.code = code
    raise skipped
