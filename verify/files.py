"""Where the suite stores its files, and how it writes them."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from verify.errors import ConfigurationError

#: The directory that this package is imported from.
IMPORT_ROOT = Path(__file__).resolve().parents[1]

#: The copies of a wheel (ci/wheel.py), relative to ``IMPORT_ROOT``.
_DATA = Path("verify", "data")

#: Whether the suite was installed from a wheel, so that there is no checkout around it. Only a wheel has the copies; a
#: ``pyproject.toml`` says nothing, because other packages leave theirs next to it.
INSTALLED = (IMPORT_ROOT / _DATA / "ci" / "constraints.txt").is_file()

#: Relative to ``repository_root``: where files are that a checkout has outside its packages.
COPIES = _DATA if INSTALLED else Path()

#: Relative to ``repository_root``: the measurements of the suite itself.
REPORTS = COPIES / "reports"

#: Names the checkout that the suite works in, whatever the current folder is. The kit (ci/kit/start.py) sets it.
ROOT_VARIABLE = "TRIATTENTION_ROOT"

#: Names the folder of an installed suite's records to child processes, which run in another folder.
REPORTS_VARIABLE = "TRIATTENTION_REPORTS"

#: The published records and the runs of this machine: relative to a checkout. An installed suite has them in the
#: current folder: then the paths are absolute, and ``repository_root() / RUNS`` is that folder too.
_RECORDS = Path(os.environ.get(REPORTS_VARIABLE) or "reports").absolute() if INSTALLED else REPORTS
EVIDENCE, RUNS = _RECORDS / "evidence", _RECORDS / "runs"

#: How to install what is missing.
SET_UP = "pip install 'triattention-verify[verify,hf]'" if INSTALLED else "make setup"

#: Errors of the file system that are the machine's, not this suite's.
_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG)

#: Byte order marks and their encodings; the mark of UTF-16 is how that of UTF-32 begins.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write ``content``, text as UTF-8, so that a reader sees the old file or the new one, never a part of it.

    Raises OSError for a device, pipe or folder at ``path``, which must not be replaced.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "it is there and is not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # which a failed write does not name
        raise


def end_of(path: Path, limit_bytes: int) -> bytes:
    """The last bytes of a file that may be large, and that may still grow. Raises OSError if it cannot be read."""
    with path.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - limit_bytes))
        return stream.read(limit_bytes)


def decoded(data: bytes) -> str:
    """The text of a file that another tool may have written: UTF-8, or the encoding that its byte order mark names.

    The mark is removed, and line ends become ``\\n``. Raises ValueError, with the line and the next step, for other
    text.
    """
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise ValueError(f"line {line} is not {encoding.removesuffix('-sig').upper()}; save it as UTF-8") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"line {line} has a NUL character; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def repository_root() -> Path:
    """The checkout that TRIATTENTION_ROOT names; without that variable, the nearest directory at or above the current
    one with a ``phases/``, else the checkout of this package.

    Of an installed suite it is always the directory that it was installed into, whose ``phases/`` came with it. Raises
    ConfigurationError if TRIATTENTION_ROOT names something else than a checkout.
    """
    if INSTALLED:
        return IMPORT_ROOT
    if named := os.environ.get(ROOT_VARIABLE):
        if not (Path(named) / "phases" / "__init__.py").is_file():
            raise ConfigurationError(f"{ROOT_VARIABLE} is {named}, which has no phases/; name a checkout, or unset it")
        return Path(named).absolute()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "phases" / "__init__.py").is_file():
            return folder
    return IMPORT_ROOT


def started_in(root: Path) -> Path:
    """The folder that paths in the commands of a record are relative to: ``root``, or that of an installed suite's
    reports.
    """
    return _RECORDS.parent if INSTALLED else root


def own_file(name: str) -> Path:
    """A file that came with the suite, by its name in the checkout. Raises ConfigurationError if it is not there."""
    file = IMPORT_ROOT / COPIES / name
    if not file.is_file():
        raise ConfigurationError(f"{file} is missing, which belongs to the suite; install the suite again")
    return file


def expanded(name: str | Path) -> Path:
    """A path that a user gave, with ``~`` for a home directory; unchanged where there is no such home."""
    return Path(os.path.expanduser(name))


def home() -> Path | None:
    """The user's home directory; None for a user without one."""
    found = os.path.expanduser("~")
    return Path(found) if found != "~" else None


def cache_folder() -> Path:
    """The folder for files that can be made again: ``TRIATTENTION_CACHE``, or one in the user's cache.

    A user without a home, or with one that cannot be written, has a folder in the temporary directory. Raises
    ConfigurationError if that belongs to somebody else.
    """
    if root := os.environ.get("TRIATTENTION_CACHE"):
        return Path(root)
    own = home()
    if own is not None and writable(usual := own / ".cache" / "triattention"):
        return usual
    folder = Path(tempfile.gettempdir()) / f"triattention-{os.getuid()}"
    if folder.exists() and folder.stat().st_uid != os.getuid():
        raise ConfigurationError(f"the cache {folder} is of another user; set TRIATTENTION_CACHE to a folder of yours")
    return folder


def writable(folder: Path) -> bool:
    """Whether files can be made in ``folder``, which need not exist yet."""
    # os.path.exists is False for what may not be looked at
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def require_writable(folder: Path) -> None:
    """Raise ConfigurationError, before the work begins, if its result could not be written to ``folder``."""
    if not writable(folder):
        raise ConfigurationError(f"{folder} cannot be written; choose another --out")


def kept_place(folder: Path, *what: Any) -> Path:
    """The file in ``folder`` for a result that depends on ``what`` and nothing else."""
    identity = json.dumps(what, sort_keys=True, default=str)
    return folder / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"


def keep(place: Path, text: str) -> None:
    """Write a file that can be made again; if it cannot be written, it is made again the next time."""
    with suppress(OSError):
        write_atomic(place, text)


def fault_of_the_machine(error: OSError | ModuleNotFoundError) -> str:
    """A missing package, or a file that cannot be used, in a sentence with the next step; empty for another error."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        own = package in ("verify", "phases", "")  # a broken checkout
        how = f"`{SET_UP}` brings" if INSTALLED else f"`{SET_UP}` or triattention-verify[verify] brings"
        return "" if own else f"{package} is not installed; {how} it"
    if error.errno not in _MACHINE:
        return ""
    return f"{error.filename or 'a file'} cannot be used ({error.strerror}); mend that and run again"


def default_out() -> Path:
    return repository_root() / RUNS


def write_out(content: str | bytes, out: Path | None) -> None:
    """Write to the file ``out``, or print. Raises ConfigurationError if the file cannot be written."""
    if out is None:
        print(content, end="")
        return
    try:
        write_atomic(out, content)
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be written ({error.strerror}); choose another --out") from error
