"""Text files as other tools write them: encodings, line ends, and JSON that can mean only one thing."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from triattention.errors import TriAttentionError

#: Byte order marks and their encodings. UTF-32 comes first, because its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
#: The first bytes of files that need unpacking or another reader.
_NO_TEXT = {
    b"\x1f\x8b": "compressed with gzip", b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"BZh91AY&SY": "compressed with bzip2", b"\xfd7zXZ": "compressed with xz", b"PAR1\x15": "a Parquet file",
}  # fmt: skip
#: Digits of an integer that Python converts; more is a mistake, or an attack on the reader.
_MOST_DIGITS = 4300


def read_text(path: Path, what: str, give: str) -> str:
    """The text of a file that ``decoded`` accepts, with line ends as ``\\n``.

    ``what`` names the file in errors and ``give`` is the next step if it cannot be opened, such as ``give a text
    file``. Raises TriAttentionError.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TriAttentionError(f"cannot read {what} {path}: {error.strerror}; {give}") from error
    return decoded(data, f"{what} {path}").replace("\r\n", "\n").replace("\r", "\n")


def decoded(data: bytes, what: str) -> str:
    """Text in UTF-8, or in the encoding that its byte order mark names; the mark is removed.

    Raises TriAttentionError, with line and next step, for any other encoding, NUL characters and archives.
    """
    for first, kind in _NO_TEXT.items():
        if data.startswith(first):
            raise TriAttentionError(f"{what} is {kind}, not text; unpack or convert it first")
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before, name = data[: error.start], encoding.removesuffix("-sig").upper()
        line = before.decode(encoding, "ignore").count("\n") + 1
        if error.end == len(data) and error.reason in ("unexpected end of data", "truncated data"):
            raise TriAttentionError(
                f"{what}, line {line}: the file ends inside a character, or is not {name}; copy it again, or convert it"
            ) from error
        raise TriAttentionError(
            f"{what}, line {line} is not {name} (byte {error.start} is 0x{data[error.start]:02x}); convert the file, "
            f"for example with iconv -f WINDOWS-1252 -t UTF-8"
        ) from error
    if "\0" in text:
        half = "UTF-16LE" if data[1::2].count(0) > data[::2].count(0) else "UTF-16BE"
        hint = f", for example with iconv -f {half} -t UTF-8" if data.count(0) > len(data) // 4 else ""
        line = text[: text.index("\0")].count("\n") + 1
        raise TriAttentionError(f"{what}, line {line} has a NUL character, so it is not UTF-8 text; convert it{hint}")
    return text


class Numeral(str):
    """A JSON number as it would be written without an exponent."""


def parse_json(text: str, *, numerals: bool = False) -> Any:
    """The value of a JSON text. ``numerals`` keeps numbers as ``Numeral``, so that no digit is lost.

    Raises ValueError, with a reason that fits into a sentence, for text that is not JSON, a repeated name in one
    object, NaN, a number beyond float64 or of more than 4300 digits, half of a surrogate pair, and nesting too deep to
    read.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unrepeated,
            parse_constant=_refuse_constant,
            parse_int=Numeral if numerals else _integer,
            parse_float=_written_out if numerals else _finite,
        )
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON ({error.msg} at {line}column {error.colno})") from error
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text.lower():
        _refuse_half_characters(value)
    return value


def _refuse_half_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair, {error.object[error.start]!r}") from None


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # a JSON reader keeps the last of two values, and a person reads the first
    if twice := [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]:
        raise ValueError(f"{twice[0]!r} twice in one object")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which JSON does not have")


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number[:40]}, which is beyond float64")
    return value


def _written_out(number: str) -> Numeral:
    mantissa = re.split("[eE]", number)[0]
    if _finite(number) == 0:
        if re.search("[1-9]", mantissa):
            raise ValueError(f"{number[:40]}, which is too small for float64")
        return Numeral(mantissa)
    return Numeral(format(Decimal(number), "f"))
