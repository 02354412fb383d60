"""README and docs: their commands exist, their links lead somewhere, and what is generated is up to date."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from verify import cli, explain
from verify.architectures import known_targets
from verify.checks import catalogue
from verify.files import EVIDENCE
from verify.record.archive import load
from verify.record.grounds import BUNDLED
from verify.record.verdict import assess
from verify.report.sentences import headline
from verify.subject.find import find_subject
from verify.tests.tree import REPOSITORY

DOCUMENTS = [
    REPOSITORY / "README.md",
    REPOSITORY / ".github" / "CONTRIBUTING.md",
    REPOSITORY / "reports" / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]

#: What a reader fills in, with something that the parser takes for it.
_STANDS_FOR = {
    "PATH": "checkout", "S": "checkout", "RECORD": "record.json", "RUN": "run", "ID": "p4.plan", "VERB": "report",
    "LAYER.NAME": "kernel.sign",
}  # fmt: skip

_COMMAND = re.compile(
    r"(OMP_NUM_THREADS=1 )?(\.venv/bin/)?(python -m (verify|triattention)\b|python -m pytest|pytest\b|make\b)"
)

#: What `make test` writes; a fresh checkout does not have it.
_MADE = "reports/durations.json"

#: The verbs that need no GPU and take seconds.
_QUICK = {"gates", "doctor", "report", "history", "explain"}


def commands(inline: bool) -> Iterator[tuple[Path, str]]:
    """Every command of the suite and of the reference in a code block, or in backticks."""
    for document in DOCUMENTS:
        text = document.read_text("utf-8")
        blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        for line in re.findall(r"`([^`\n]+)`", text) if inline else lines:
            line = line.removeprefix("$ ").partition("  #")[0].strip()
            if _COMMAND.match(line):
                yield document, line


WHOLE, INLINE = ([*dict.fromkeys(commands(inline))] for inline in (False, True))


def _cases(found: list[tuple[Path, str]]) -> list[object]:
    return [pytest.param(command, id=f"{document.stem}-{number}") for number, (document, command) in enumerate(found)]


def _words(command: str) -> list[str]:
    words = shlex.split(command)
    return [_STANDS_FOR.get(word, word) for word in (words[1:] if "=" in words[0] else words)]


def _parser(package: str) -> argparse.ArgumentParser:
    if package == "verify":
        return cli.parser()
    # imported here, as another subject may be under test in this process
    return find_subject("bundled", REPOSITORY).module("cli")._parsers()[0]


def test_commands_are_found() -> None:
    assert (len(WHOLE), len(INLINE)) > (15, 30)


@pytest.mark.parametrize("command", _cases(WHOLE))
def test_a_command_in_a_block_is_one_that_there_is(command: str) -> None:
    words = _words(command)
    if words[0].endswith("make"):
        _is_made(words)
    elif words[0].endswith("pytest") or words[2] == "pytest":
        _collects(words[words.index("pytest") + 1 :] if "pytest" in words else words[1:])
    elif words[2] in ("verify", "triattention"):
        _parser(words[2]).parse_args(words[3:])


@pytest.mark.parametrize("command", _cases(INLINE))
def test_a_command_in_a_sentence_has_a_verb_and_options_that_there_are(command: str) -> None:
    words = _words(command)
    if words[0].endswith("make"):
        _is_made(words)
    elif words[1:3] in (["-m", "verify"], ["-m", "triattention"]) and len(words) > 3 and words[3].isidentifier():
        (verbs,) = (one for one in _parser(words[2])._actions if isinstance(one, argparse._SubParsersAction))
        known = verbs.choices[words[3]]._option_string_actions
        assert {word for word in words if word.startswith("--")} <= known.keys(), command


def _is_made(words: list[str]) -> None:
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    targets = {word for word in words[1:] if "=" not in word}
    assert targets <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def _collects(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
    child = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stdout[-500:] + child.stderr[-500:]


def _quick() -> Iterator[str]:
    for _, command in WHOLE + INLINE:
        words = command.split()
        written = {*_STANDS_FOR, ">", "html", "badge"}
        if words[1:3] == ["-m", "verify"] and {*words[3:4]} & _QUICK and not {*words} & written:
            yield command.replace(".venv/bin/python", "python")


@pytest.mark.parametrize("command", sorted(set(_quick())))
def test_a_command_that_needs_no_gpu_and_is_quick_works(command: str, tmp_path: Path) -> None:
    words = [sys.executable if word.endswith("python") else word for word in _words(command)]
    child = subprocess.run(
        words,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "TRIATTENTION_CACHE": str(tmp_path)},
    )
    assert child.returncode in (0, 5), child.stderr[-1000:]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_and_files_lead_somewhere(document: Path) -> None:
    text = document.read_text("utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / link).exists(), link
    file = r"`((?:verify|phases|triattention|docs|ci|reports)/[\w./-]+\.(?:py|toml|md|json|txt))`"
    assert {name for name in re.findall(file, text) if not (REPOSITORY / name).exists()} <= {_MADE}


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text("utf-8").splitlines()) <= 120


def test_the_status_is_that_of_the_published_records() -> None:
    """Print what stands there: ``python -m verify.tests.test_documents``."""
    told = re.search(r"<!-- status -->\n(.*)\n<!-- /status -->", (REPOSITORY / "README.md").read_text("utf-8"))
    assert told is not None
    assert told[1] == status()


def status() -> str:
    """The headline of the published records of the reference, whose results count as they were made, with the day of
    the newest.
    """
    records = [one for one in load([REPOSITORY / EVIDENCE]).records if one.subject.source == BUNDLED]
    checks = list(catalogue())
    found = headline([assess(target, records, checks) for target in known_targets()])
    newest = max(record.time_utc for record in records)[:10]
    return f"**Status** (published records up to {newest}): {found}"


def test_the_list_of_checks_is_up_to_date() -> None:
    assert (REPOSITORY / "docs" / "checks.md").read_text("utf-8") == explain.checks_page()


if __name__ == "__main__":
    print(status())
