"""One archive that shows a third party what a record proves: the record, what git says about suite and subject
(``verify/report/pack_git.py``), the in-toto statement and the hashes of all three, and nothing else.

``make`` writes it, ``check`` reads it. The same record and checkout always make the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from verify.errors import ConfigurationError, Exit
from verify.files import write_out
from verify.record import checker
from verify.record.archive import locate
from verify.record.checker import Problem
from verify.record.reading import UnreadableRecord, read_record
from verify.report.export import attestation, counting
from verify.report.pack_git import Git, contradictions, describe

RECORD, STATEMENT, GIT, SUMS = "record.json", "statement.json", "git.json", "SHA256SUMS"
_MEMBERS = (RECORD, STATEMENT, GIT, SUMS)

SUFFIX = ".tar.gz"
_GZIP = b"\x1f\x8b"

#: No record comes near it; an archive that unpacks to more is refused before it fills the memory.
_LIMIT_BYTES = 64 * 2**20


def make(name: str, subject: str | None = None, out: Path | None = None) -> int:
    """Write the archive of the record ``name``, and print its path; return 0.

    ``subject`` is where the judged implementation is, for what git says about it: by default the bundled one. Raises
    ConfigurationError for a record that ``check`` refuses or that counts for no verdict, and for a subject that the
    record is not about.
    """
    path = locate(name)[0]
    record = counting(path)
    if problems := checker.examine([path], checker.every_check()):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigurationError(
            f"{problems[0]}{more}; only a sound record can be packed, see: python -m verify check {name}"
        )
    git, absent = describe(record, subject)
    files = {
        RECORD: path.read_bytes(),
        STATEMENT: attestation(record).encode(),
        GIT: (git.model_dump_json(indent=1) + "\n").encode(),
    }
    place = out or Path(f"{record.run_id}{SUFFIX}")
    write_out(_archive(files | {SUMS: _sums(files)}), place)
    print(place)
    for what, tree in (("suite", git.suite), ("subject", git.subject)):
        if tree is None:
            print(f"verify: the archive has no git log of the {what}{absent.get(what, '')}", file=sys.stderr)
        elif not tree.same:
            print(f"verify: the {what} has changed since the record was made, and the archive says so", file=sys.stderr)
    return Exit.OK


def check(names: Sequence[str], *, as_json: bool = False) -> int:
    """``verify check``: print every problem of records and of archives of records; 1 if there are any, else 0.

    Of a sound archive it also says what nothing could be derived from. Raises ConfigurationError for a name that is
    neither.
    """
    if not any(_is_archive(Path(name)) for name in names):
        return checker.check(names, as_json=as_json)
    paths: list[Path] = []
    shown: dict[str, str] = {}
    problems: list[Problem] = []
    with TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            if not _is_archive(Path(name)):
                paths += locate(name)
                continue
            try:
                files = _opened(Path(name))
            except ValueError as error:
                problems.append(Problem(name, "", str(error)))
                continue
            place = Path(folder) / str(number) / RECORD
            place.parent.mkdir()
            place.write_bytes(files[RECORD])
            shown[str(place)] = f"{name}:{RECORD}"
            paths.append(place)
            problems += [Problem(name, "", told) for told in _contradictions(files, place)]
        problems += [_renamed(one, shown) for one in checker.examine(paths, checker.every_check())]
        listed = [shown.get(str(path), str(path)) for path in paths]
    code = checker.tell(listed, problems, as_json=as_json)
    if shown and not as_json and code == Exit.OK:
        print(f"{GIT} is the packer's own statement, which the record does not prove")
    return code


def _renamed(one: Problem, shown: Mapping[str, str]) -> Problem:
    """The problem of a record that was unpacked, with the name of its archive instead of the temporary file."""
    record, problem = one.record, one.problem
    for place, name in shown.items():
        record, problem = record.replace(place, name), problem.replace(place, name)
    return replace(one, record=record, problem=problem)


def _sums(files: Mapping[str, bytes]) -> bytes:
    """The hashes as ``sha256sum --check`` reads them."""
    return "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in _MEMBERS[:-1]).encode()


def _tar(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in _MEMBERS:
            member = tarfile.TarInfo(name)  # mode 644, time 0, owner 0
            member.size = len(files[name])
            archive.addfile(member, io.BytesIO(files[name]))
    return stream.getvalue()


def _archive(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0) as compressed:
        compressed.write(_tar(files))
    return stream.getvalue()


def _is_archive(path: Path) -> bool:
    """Whether a file is compressed, whatever its name; a record never is."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(_GZIP)) == _GZIP


def _opened(path: Path) -> dict[str, bytes]:
    """The members of an archive. Raises ValueError for one that has anything else, or less."""
    try:
        with gzip.open(path) as compressed:
            content = compressed.read(_LIMIT_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"is cut off or not an archive ({error})") from error
    if len(content) > _LIMIT_BYTES:
        raise ValueError(f"unpacks to more than {_LIMIT_BYTES // 2**20} MiB, and no record is that large")
    try:
        files = dict(_unpacked(content))
    except tarfile.TarError as error:
        raise ValueError(f"is not an archive ({error})") from error
    if absent := [name for name in _MEMBERS if name not in files]:
        raise ValueError(f"has no {absent[0]}")
    # owners, times, comments and what follows the last member could carry something else
    if content != _tar(files):
        raise ValueError("has more than its four files, or in another form than `verify pack` writes")
    return files


def _unpacked(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Each member and its content. Raises TarError for what is not a tar, ValueError for a member that ``pack`` does
    not write.
    """
    # one header at a time: the extensions that TarFile would follow can nest, lie about sizes, or end in any exception
    place, seen = 0, set()
    while any(block := content[place : place + tarfile.BLOCKSIZE]):
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        name, start = member.name, place + tarfile.BLOCKSIZE
        if name not in _MEMBERS:
            raise ValueError(f"has {name!r}, and only {', '.join(_MEMBERS)} belong in it")
        if member.type != tarfile.REGTYPE:
            raise ValueError(f"has {name} as something other than a regular file")
        if name in seen:
            raise ValueError(f"has {name} twice")
        if not 0 <= member.size <= len(content) - start:
            raise ValueError(f"is cut off: {name} should have {member.size} bytes")
        seen.add(name)
        yield name, content[start : start + member.size]
        place = start + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _contradictions(files: Mapping[str, bytes], place: Path) -> Iterator[str]:
    """What disagrees among the members; ``place`` is the unpacked record, which is examined elsewhere."""
    if files[SUMS] != _sums(files):
        yield f"{SUMS} does not have the hashes of the other files"
    git = None
    try:
        git = Git.model_validate_json(files[GIT])
    except ValidationError as error:
        first = error.errors()[0]
        yield f"{GIT} is not what `verify pack` writes ({'.'.join(map(str, first['loc']))}: {first['msg']})"
    try:
        record = read_record(place)
    except UnreadableRecord:
        return
    if record.apart:
        yield f"{RECORD} counts for no verdict, because it only confirms another run or is shown next to others"
    if files[STATEMENT] != attestation(record).encode():
        yield f"{STATEMENT} is not the statement that this suite derives from {RECORD}"
    yield from (f"{GIT} {told}" for told in (contradictions(git, record) if git else ()))
