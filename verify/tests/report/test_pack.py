"""The archive of a record: the same bytes each time, nothing in it but four files, and refused if any was touched."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from verify import cli
from verify.record.schema import Record
from verify.report import pack, pack_git
from verify.report.export import attestation
from verify.tests.record import test_checker
from verify.tests.record.test_checker import sound
from verify.tests.samples import REPOSITORY, result, write

Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def small_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("record.verdict", "record.checker"):
        monkeypatch.setattr(f"verify.{module}.catalogue", test_checker.catalogue)


@cache
def head() -> str:
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def here(**subject: str) -> Record:
    """A sound record that was made at the commit of this checkout."""
    made = sound()
    return made.model_copy(update={"subject": made.subject.model_copy(update={"git_sha": head(), **subject})})


def packed(folder: Path, made: Record | None = None) -> Path:
    path, out = write(made or here(), folder, "evidence"), folder / "pack.tar.gz"
    assert pack.make(str(path), out=out) == 0
    return out


def members(path: Path) -> Files:
    with tarfile.open(path) as archive:
        return {one.name: archive.extractfile(one).read() for one in archive}  # type: ignore[union-attr]


def hashed(files: Mapping[str, bytes]) -> Files:
    """The files with hashes that are right for them, as whoever changes one could make them."""
    sums = "".join(
        f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in files if name != "SHA256SUMS"
    ).encode()
    return {**files, "SHA256SUMS": sums}


def written(path: Path, files: Mapping[str, bytes], change: Callable[[tarfile.TarInfo], object] | None = None) -> Path:
    with tarfile.open(path, "w:gz", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            one = tarfile.TarInfo(name)
            one.size = len(content)
            if change:
                change(one)
            archive.addfile(one, io.BytesIO(content))
    return path


def told(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``check`` says of an archive that it refuses."""
    capsys.readouterr()
    assert cli.main(["check", str(path)]) == 1
    return capsys.readouterr().out


def test_it_has_four_files_and_check_finds_it_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = here()
    path = packed(tmp_path, made)
    files = members(path)
    assert [*files] == ["record.json", "statement.json", "git.json", "SHA256SUMS"]
    assert files["record.json"] == (tmp_path / "evidence" / f"{made.run_id}.json").read_bytes()
    assert files["statement.json"].decode() == attestation(made)
    capsys.readouterr()
    assert cli.main(["check", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"sound: {path}:record.json"
    assert said[1].startswith("git.json is the packer's own statement")
    assert len(said) == 2
    assert cli.main(["check", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"records": [f"{path}:record.json"], "problems": []}


def test_the_same_record_makes_the_same_bytes(tmp_path: Path) -> None:
    path = packed(tmp_path)
    first = path.read_bytes()
    os.utime(tmp_path / "evidence" / f"{sound().run_id}.json", (1, 1))
    assert packed(tmp_path).read_bytes() == first


def test_its_hashes_are_those_that_sha256sum_reads(tmp_path: Path) -> None:
    with tarfile.open(packed(tmp_path)) as archive:
        archive.extractall(tmp_path / "out", filter="data")
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(command, cwd=tmp_path / "out", capture_output=True, timeout=60).returncode == 0


def test_git_is_told_without_people_and_places(tmp_path: Path) -> None:
    text = members(packed(tmp_path))["git.json"].decode()
    git = pack_git.Git.model_validate_json(text)
    assert git.suite is not None
    assert git.subject is not None
    assert not git.suite.same  # the sample was made by no suite
    newest = git.suite.log[0]
    show = ["git", "show", "--no-patch", "--format=%s%n%ae%n%an", newest.commit]
    about = subprocess.run(show, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    assert pack_git.shown(about[0]) == newest.subject
    assert git.subject.made_at is not None
    assert git.subject.made_at.commit == head()
    assert not any(word in text for word in {*about[1:], str(Path.cwd()), str(Path.home()), os.uname().nodename})
    assert all(re.fullmatch(r"[ MADRCU?!]{2} (verify|phases)/.+", line) for line in git.suite.status)


def test_without_a_name_it_is_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(sound(), tmp_path, "evidence")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pack", str(path)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{sound().run_id}.tar.gz\n"
    assert (tmp_path / f"{sound().run_id}.tar.gz").is_file()
    assert "the suite has changed since the record was made" in said.err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"results": [result("p1.bf16.matmul")]}, "only a sound record can be packed"),
        ({"rehearsal": True}, "is made up for a rehearsal"),
        ({"beside": "newest"}, "counts for no verdict"),
        ({"confirms": "run-1"}, "counts for no verdict"),
    ],
    ids=["unsound", "rehearsal", "beside", "confirms"],
)
def test_what_proves_nothing_is_not_packed(
    change: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(sound().model_copy(update=change), tmp_path, "evidence")
    assert cli.main(["pack", str(path), "--out", str(tmp_path / "out.tar.gz")]) == 3
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out.tar.gz").exists()


def test_another_subject_is_found_where_it_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(here(source="checkout:plain"), tmp_path, "evidence"), tmp_path / "out.tar.gz"
    assert cli.main(["pack", str(path), "--out", str(out)]) == 0
    assert "no git log of the subject; give its checkout with --subject PATH" in capsys.readouterr().err
    assert pack_git.Git.model_validate_json(members(out)["git.json"]).subject is None
    plain = Path(pack.__file__).parents[1] / "examples" / "plain"
    assert cli.main(["pack", str(path), "--subject", str(plain), "--out", str(out)]) == 0
    assert pack_git.Git.model_validate_json(members(out)["git.json"]).subject is not None
    assert cli.main(["pack", str(path), "--subject", "bundled", "--out", str(out)]) == 3
    assert "the record is about the subject checkout:plain, not bundled" in capsys.readouterr().err


def test_a_folder_that_a_repository_only_contains_has_no_log(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, timeout=60)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "module.py").touch()
    assert pack_git._tree(tmp_path, [tmp_path / "venv"], same=True) is None


@pytest.mark.parametrize(
    ("subject", "kept"),
    [
        ("Mend the scorer: masks of p4/p5 and 3 / 4 of ci/kit", True),
        ("Read ../other and 1.2.3 (#12)", True),
        ("Merge branch 'main' of git@host:team/impl", False),
        ("Merge branch 'main' of /home/alice/work/x", False),
        ("Merge pull request #5 from alice/x", False),
        ("Revert \"Merge branch 'fix' of host\"", False),
        ("Thank alice@example.org", False),
        ("Take it from https://example.org/x", False),
        ("Take it from host:work/x", False),
        ("Try it on 10.0.0.5", False),
        ("Read '/srv/data'", False),
        ("Read ~/data and ~alice/data", False),
        (r"Read C:\data", False),
        ("One line\rand \u2028 another", False),
    ],
)
def test_a_subject_line_with_an_address_or_a_path_is_left_out(subject: str, kept: bool, tmp_path: Path) -> None:
    assert pack_git.shown(subject) == (subject if kept else "(left out)")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "module.py").touch()
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", subject]):
        subprocess.run([*git, *words], check=True, timeout=60)
    tree = pack_git._tree(tmp_path, [tmp_path / "module.py"], same=True)
    assert tree is not None
    assert [one.subject for one in tree.log] == [subject if kept else "(left out)"]


def test_a_checkout_without_the_commit_of_the_record_has_no_log_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = packed(tmp_path, sound())
    said = capsys.readouterr().err
    assert f"no git log of the subject, because its checkout does not have {'1' * 40}, which the record names" in said
    assert pack_git.Git.model_validate_json(members(path)["git.json"]).subject is None
    assert cli.main(["check", str(path)]) == 0
    packed(tmp_path, here(git_sha="none"))
    git = pack_git.Git.model_validate_json(members(path)["git.json"])
    assert git.subject is not None
    assert git.subject.made_at is None
    assert cli.main(["check", str(path)]) == 0


def test_the_commit_of_a_record_is_never_an_option_for_git(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = members(packed(tmp_path))
    place = tmp_path / "written"
    whole = json.loads(files["record.json"])
    whole["subject"]["git_sha"] = f"--output={place}"
    made = Record.model_validate(whole)
    changed = {**files, "record.json": json.dumps(whole).encode(), "statement.json": attestation(made).encode()}
    assert "is neither a commit nor 'none'" in told(written(tmp_path / "changed.tar.gz", hashed(changed)), capsys)
    assert not list(tmp_path.glob("written*"))


def _forged(change: Callable[[dict[str, Any]], object]) -> Callable[[Files], Files]:
    """The files with another git.json, and hashes to match."""

    def made(files: Files) -> Files:
        whole = json.loads(files["git.json"])
        change(whole)
        return hashed({**files, "git.json": json.dumps(whole).encode()})

    return made


def _at_another_commit(whole: dict[str, Any]) -> None:
    whole["subject"] |= {"same": True, "made_at": {**whole["subject"]["log"][0], "commit": "2" * 40}}


def _as_it_is(whole: dict[str, Any]) -> None:
    for one in ("suite", "subject"):
        whole[one] |= {"same": True, "status": []}


def _another_number(files: Files) -> Files:
    return {**files, "record.json": files["record.json"].replace(b"Sample GPU 120", b"Sample GPU 121")}


def _a_failure_turned(files: Files) -> Files:
    whole = json.loads(files["record.json"])
    whole["results"] = whole["results"][1:]
    return hashed({**files, "record.json": json.dumps(whole).encode()})


def _a_better_statement(files: Files) -> Files:
    return hashed(
        {**files, "statement.json": files["statement.json"].replace(b'"WARNED"', b'"PASSED"').replace(b"120", b"90")}
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_another_number, "SHA256SUMS does not have the hashes of the other files"),
        (_a_failure_turned, "is must-pass on sm120 and has no result"),
        (_a_better_statement, "statement.json is not the statement that this suite derives from record.json"),
        (
            _forged(lambda git: git["suite"]["log"][0].update(author="somebody")),
            "git.json is not what `verify pack` writes (suite.log.0.author",
        ),
        (
            _forged(lambda git: git["suite"]["log"][0].update(subject="Thank a@b")),
            "may name a person or a place",
        ),
        (_forged(lambda git: git["suite"]["status"].append(" M /home/a/x")), "git.json is not what `verify pack`"),
        (_forged(lambda git: git["suite"].update(log=git["suite"]["log"][:1] * 2)), "the log has a commit twice"),
        (_forged(_at_another_commit), "says that the record was made at the commit 2222"),
        (_forged(lambda git: git["subject"].update(made_at=None)), "made at the commit none, and the record says"),
        (_forged(lambda git: git["suite"].update(made_at=git["suite"]["log"][0])), "names a commit for the suite"),
        (
            _forged(lambda git: git["suite"]["log"][0].update(subject="Mend it all")),
            "git.json says of the suite's commit",
        ),
        (
            _forged(lambda git: git["subject"]["made_at"].update(time_utc="2020-01-01T00:00:00Z")),
            "git.json says of the subject's commit",
        ),
        (lambda files: {**files, "notes.txt": b"more"}, "has 'notes.txt', and only record.json"),
        (lambda files: {**files, "../record.json": b"{}"}, "has '../record.json', and only record.json"),
        (lambda files: {**files, "/etc/passwd": b"{}"}, "has '/etc/passwd', and only record.json"),
        (lambda files: {name: files[name] for name in files if name != "git.json"}, "has no git.json"),
        (lambda files: dict(reversed(files.items())), "has more than its four files, or in another form"),
    ],
)
def test_a_changed_archive_is_refused(
    change: Callable[[Files], Files], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = packed(tmp_path)
    assert sentence in told(written(tmp_path / "changed.tar.gz", change(members(path))), capsys)


def test_a_history_with_the_files_of_the_record_is_compared_with_this_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = packed(tmp_path)
    own = pack_git._tree
    monkeypatch.setattr(pack_git, "_tree", lambda *what: own(*what).model_copy(update={"status": []}))
    said = told(written(tmp_path / "changed.tar.gz", _forged(_as_it_is)(members(path))), capsys)
    for what in ("suite", "subject"):
        assert f"git.json says that the {what} at the commit " in said
    assert said.count("is that of the record, and in this checkout it is not") == 2


def _link(one: tarfile.TarInfo) -> None:
    one.type, one.linkname, one.size = tarfile.SYMTYPE, "/etc/passwd", 0


def _device(one: tarfile.TarInfo) -> None:
    one.type, one.size = tarfile.CHRTYPE, 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_link, "record.json as something other than a regular file"),
        (_device, "record.json as something other than a regular file"),
        (lambda one: setattr(one, "uname", "somebody"), "has more than its four files, or in another form"),
        (lambda one: setattr(one, "mtime", 1), "has more than its four files, or in another form"),
    ],
    ids=["link", "device", "owner", "time"],
)
def test_a_member_that_is_no_plain_file_is_refused(
    change: Callable[[tarfile.TarInfo], object], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = packed(tmp_path)
    assert sentence in told(written(tmp_path / "changed.tar.gz", members(path), change), capsys)


@pytest.mark.parametrize(
    "extension",
    [
        {"size": "99999999999999999999"},
        {"size": "-512"},
        {"GNU.sparse.map": "x"},
        {"GNU.sparse.size": "x", "GNU.sparse.numblocks": "y"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 20},
    ],
    ids=["huge", "negative", "map", "blocks", "sparse"],
)
def test_an_extended_header_is_refused_unread(
    extension: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = tarfile.TarInfo("record.json")
    header.pax_headers = extension
    place = tmp_path / "pack.tar.gz"
    place.write_bytes(gzip.compress(header.tobuf(tarfile.PAX_FORMAT) + bytes(2048)))
    said = told(place, capsys)
    assert said.startswith(f"{place}: has '././@PaxHeader', and only record.json, ")
    assert said.count("\n") == 1


def test_extended_headers_of_headers_are_refused_unread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = tarfile.TarInfo("record.json")
    header.pax_headers = {"comment": "x"}
    (tmp_path / "pack.tar.gz").write_bytes(gzip.compress(header.tobuf(tarfile.PAX_FORMAT)[:1024] * 2000 + bytes(2048)))
    assert "has '././@PaxHeader'" in told(tmp_path / "pack.tar.gz", capsys)


def _with_size(size: int) -> bytes:
    header = tarfile.TarInfo("record.json")
    header.size = size
    return gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))


def test_a_member_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed(tmp_path)
    with tarfile.open(tmp_path / "twice.tar.gz", "w:gz") as archive:
        for name in ("record.json", "record.json"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert "has record.json twice" in told(tmp_path / "twice.tar.gz", capsys)
    trailing = tmp_path / "trailing.tar.gz"
    trailing.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"more"))
    assert "has more than its four files" in told(trailing, capsys)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (gzip.compress(bytes(pack._LIMIT_BYTES + 1)), "unpacks to more than 64 MiB"),
        (gzip.compress(b"text"), "is not an archive"),
        (gzip.compress(bytes(1000))[:-9], "is cut off or not an archive"),
        (_with_size(2**80), "is cut off: record.json should have 1208925819614629174706176 bytes"),
        (_with_size(-512), "is cut off: record.json should have -512 bytes"),
        (b"\x1f\x8b and text", "is cut off or not an archive"),
        (gzip.compress(bytes(1000))[:10] + b"\xff" * 20, "is cut off or not an archive"),
    ],
    ids=["bomb", "text", "cut off", "huge", "negative", "no gzip", "damaged"],
)
def test_what_is_no_archive_is_refused(
    content: bytes, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pack.tar.gz").write_bytes(content)
    assert sentence in told(tmp_path / "pack.tar.gz", capsys)


def test_archives_and_records_are_checked_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed(tmp_path)
    record = tmp_path / "evidence" / f"{sound().run_id}.json"
    capsys.readouterr()
    assert cli.main(["check", str(path), str(record)]) == 1
    said = capsys.readouterr().out
    assert f"of {record}; they cannot be merged" in said or f"of {path}:record.json; they cannot be merged" in said
    assert cli.main(["check", str(path), "absent"]) == 3
