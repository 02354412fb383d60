"""What an archive says of the git history of suite and subject, and what of that cannot be true.

It is the packer's own statement: a record proves the digests of the files that were used, not the history around them.
So ``contradictions`` derives again what it can.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from verify.errors import ConfigurationError
from verify.files import IMPORT_ROOT, repository_root
from verify.record.digest import instrument_sha256
from verify.record.schema import Record
from verify.record.strict import Strict
from verify.subject.find import find_subject
from verify.subject.subject import Subject

_GIT_LIMIT_S = 60
_COMMITS = 20

#: In place of a subject line that may say who or where.
LEFT_OUT = "(left out)"

#: An address (with an @, or a colon inside a word as in a URL or HOST:PATH), an IP address, a path from the root or a
#: home, a path of Windows, and what git and its hosts write of a merge.
_TELLING = re.compile(
    r"@|:\S|\b\d+(\.\d+){3}\b|(?<![\w.)])/\S|~[\w.-]*/|\\|\bMerge (branch|commit|pull request|remote|tag)"
)

#: A line of ``git status --porcelain``, whose paths are relative to the top of the checkout.
_STATUS = r'^[ MTADRCU?!]{2} "?[^"/]'

_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

Status = Annotated[str, StringConstraints(pattern=_STATUS)]


class Commit(Strict):
    """One line of a git log, without its author."""

    commit: str = Field(pattern=f"^({_SHA.pattern})$")
    time_utc: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
    subject: str

    @model_validator(mode="after")
    def _tells_nobody(self) -> Self:
        if self.subject != shown(self.subject):
            raise ValueError(f"the subject line of {self.commit} may name a person or a place")
        return self


class Tree(Strict):
    """What git says about a folder: the newest commits that changed it, and what differs from the last of all.

    ``same`` is whether the content is that of the record; if not, the record was made with other files. ``made_at`` is
    the commit that the record names, which is a commit of the same checkout; None if the record names none for it.
    """

    same: bool
    made_at: Commit | None
    status: list[Status]
    log: list[Commit] = Field(min_length=1, max_length=_COMMITS)

    @model_validator(mode="after")
    def _has_each_commit_once(self) -> Self:
        if len({one.commit for one in self.log}) < len(self.log):
            raise ValueError("the log has a commit twice")
        return self


class Git(Strict):
    """Suite and subject; None for one that is not in a checkout."""

    suite: Tree | None
    subject: Tree | None


def shown(subject: str) -> str:
    """A subject line, or ``LEFT_OUT`` if it has an address or a path, or is of a merge."""
    return LEFT_OUT if _TELLING.search(subject) or not subject.isprintable() else subject


def describe(record: Record, name: str | None) -> tuple[Git, dict[str, str]]:
    """What git says about the suite and the subject ``name`` of a record, and for one without a log the end of a
    sentence that says why.

    Raises ConfigurationError for a subject that the record is not about, and if git does not answer.
    """
    absent: dict[str, str] = {}
    suite, subject = _suite(record), None
    if name is None and record.subject.source != "bundled":
        absent["subject"] = "; give its checkout with --subject PATH to add it"
    elif (subject := _subject(record, name)) is not None and not _names(subject, record):
        sha = record.subject.git_sha
        subject, absent["subject"] = (
            None,
            f", because its checkout does not have {sha}, which the record names; fetch it",
        )
    return Git(suite=suite, subject=subject), absent


def contradictions(git: Git, record: Record) -> Iterator[str]:
    """What cannot be true of the history that came with a record; what this checkout does not know may be anything."""
    if git.suite is not None and git.suite.made_at is not None:
        yield "names a commit for the suite, and a record names one for the subject only"
    if git.subject is not None and not _names(git.subject, record):
        named = git.subject.made_at.commit if git.subject.made_at else "none"
        yield f"says that the record was made at the commit {named}, and the record says {record.subject.git_sha}"
    yield from _otherwise("suite", git.suite, _suite(record))
    if record.subject.source == "bundled":
        try:
            own = _subject(record, None)
        except ConfigurationError:  # there is none next to these checks, so nothing is known of it
            return
        yield from _otherwise("subject", git.subject, own)


def _names(tree: Tree, record: Record) -> bool:
    """Whether what git says of the subject has the commit that the record names."""
    return (tree.made_at.commit if tree.made_at else "none") == record.subject.git_sha


def _otherwise(what: str, told: Tree | None, own: Tree | None) -> Iterator[str]:
    """What this checkout says otherwise of the same commits."""
    if told is None or own is None:
        return
    theirs = [*told.log, *([told.made_at] if told.made_at else [])]
    known = _commits(IMPORT_ROOT if what == "suite" else _bundled().root, [one.commit for one in theirs])
    for one in theirs:
        if known.get(one.commit, one) != one:
            yield f"says of the {what}'s commit {one.commit} what this checkout does not"
    if told.log[0].commit == own.log[0].commit and not told.status and not own.status and told.same != own.same:
        yield (
            f"says that the {what} at the commit {own.log[0].commit} {_is(told.same)} that of the record, and in this "
            f"checkout it {_is(own.same)}"
        )


def _is(same: bool) -> str:
    return "is" if same else "is not"


def _suite(record: Record) -> Tree | None:
    root = repository_root()
    same = instrument_sha256(root) == record.instrument_sha256
    return _tree(IMPORT_ROOT, [IMPORT_ROOT / "verify", root / "phases"], same)


def _subject(record: Record, name: str | None) -> Tree | None:
    source = record.subject.source
    found = find_subject(name, repository_root()) if name else _bundled()
    if found.source != source:
        raise ConfigurationError(f"the record is about the subject {source}, not {found.source}; name its checkout")
    same = found.content_sha256() == record.subject.content_sha256
    return _tree(found.root, [found.folder], same, record.subject.git_sha)


def _bundled() -> Subject:
    return find_subject("bundled", repository_root())


def _tree(root: Path, folders: Sequence[Path], same: bool, made_at: str = "none") -> Tree | None:
    names = [str(folder) for folder in folders]
    # a repository that merely contains them, as one with a virtual environment does, says nothing about them
    if not _git(root, "ls-files", "--", *names):
        return None
    log = _log(root, f"--max-count={_COMMITS}", "--", *names)
    status = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *names)
    if not log or status is None:
        return None
    named = _commits(root, [made_at]).get(made_at)
    return Tree(same=same, made_at=named, status=[line for line in status.split("\n") if line], log=log)


def _commits(root: Path, hashes: Sequence[str]) -> dict[str, Commit]:
    """Those of some commits that a checkout has, by their hashes."""
    wanted = [one for one in hashes if _SHA.fullmatch(one)]  # never an option for git, whatever a record has there
    found = _log(root, "--no-walk", "--ignore-missing", *wanted, "--") if wanted else []
    return {one.commit: one for one in found}


def _log(root: Path, *what: str) -> list[Commit]:
    form = ("--no-show-signature", "--encoding=UTF-8", "--format=%H%x00%ct%x00%s")
    commits = []
    for line in filter(None, (_git(root, "log", *form, *what) or "").split("\n")):
        commit, seconds, subject = line.split("\0")
        moment = datetime.fromtimestamp(int(seconds), UTC)
        commits.append(Commit(commit=commit, time_utc=f"{moment:%Y-%m-%dT%H:%M:%SZ}", subject=shown(subject)))
    return commits


def _git(root: Path, *arguments: str) -> str | None:
    """The output of git in ``root``; None if that is not a checkout with a commit, or git is missing. Raises
    ConfigurationError if git does not answer.
    """
    command = ["git", "--no-optional-locks", "-c", "core.quotePath=true", "-C", str(root), *arguments]
    try:
        child = subprocess.run(command, capture_output=True, timeout=_GIT_LIMIT_S)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired as error:
        raise ConfigurationError(f"git did not answer in {root} within {_GIT_LIMIT_S} s; run it again") from error
    # not as text, which would take a carriage return in a subject line for the end of the line
    return child.stdout.decode(errors="replace").rstrip("\n") if child.returncode == 0 else None
