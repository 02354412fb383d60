"""``subject.toml``: what an implementation is called, what it claims to be, and what it takes.

[subject]                  # all optional
package = "theirs"         # the package in the role of triattention; for a checkout only
name = "Theirs"            # how a record names it
version = "1.2"
profile = "scorer"         # what it must pass: scorer, engine, serving or full
sources = ["their_lib"]    # further packages whose code is the subject's own
plain_path = "C"           # what the path without Triton is called in reports

[names]                    # published name = "module:attribute" in the subject
"vllm.core.scoring.compute_scores" = "theirs.scores:score"

[arguments."vllm.core.scoring.compute_scores"]   # published parameter = the subject's, or false if it takes none
key_states = "keys"
cache_positions = false

[offers]                   # the values that it takes; a property that is left out is not narrowed
offsets = [[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]]
aggregation = ["mean"]

[offers.patch]             # the same for options of apply_triattention_patch, also of one that it always behaves by
normalize_scores = [true]
"""

from __future__ import annotations

import difflib
import reprlib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from verify.checks import PROFILES
from verify.errors import ConfigurationError
from verify.files import decoded
from verify.subject.published import NAMES, OPTIONAL, PATCH, defaults_of, parameters_of

FILE = "subject.toml"

_Dotted = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]
_Target = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
_Word = Annotated[str, StringConstraints(min_length=1)]
_Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")]

_Model = TypeVar("_Model", bound=BaseModel)

_PUBLISHED = tuple(f"{name.module}.{name.name}" for name in (*NAMES, *OPTIONAL))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class About(_Strict):
    """The subject itself."""

    package: _Dotted | None = None
    name: _Word | None = None
    version: _Word | None = None
    profile: str | None = None
    sources: list[_Dotted] = Field(default_factory=list)
    plain_path: _Word = "PyTorch"


_Sizes = Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)]
_Flags = Annotated[list[bool], Field(min_length=1)]
_Dtypes = Annotated[list[Literal["float32", "bfloat16", "float16"]], Field(min_length=1)]
_Styles = Annotated[list[Literal["half", "interleaved"]], Field(min_length=1)]
_Aggregations = Annotated[list[Literal["mean", "max"]], Field(min_length=1)]
_Strides = Annotated[list[Literal["contiguous", "transposed", "sliced", "spread"]], Field(min_length=1)]
_Weights = Annotated[list[Literal["drawn", "ones"]], Field(min_length=1)]
_Offset = Annotated[float, Field(allow_inf_nan=False)] | Annotated[int, Field(gt=-(2**63), lt=2**63)]
_Offsets = Annotated[list[Annotated[list[_Offset], Field(min_length=1)]], Field(min_length=1)]


class Offers(_Strict):
    """The values that a subject takes, by property of a scoring problem; ``verify/judge/problems.py`` defines them."""

    d: _Sizes | None = None
    b: _Sizes | None = None
    h: _Sizes | None = None
    g: _Sizes | None = None
    dtype: _Dtypes | None = None
    style: _Styles | None = None
    aggregation: _Aggregations | None = None
    strides: _Strides | None = None
    offsets: _Offsets | None = None
    disable_mlr: _Flags | None = None
    disable_trig: _Flags | None = None
    low_norm: _Flags | None = None
    weights: _Weights | None = None
    patch: dict[str, Annotated[list[bool | int | str], Field(min_length=1)]] = Field(default_factory=dict)

    def narrowed(self) -> dict[str, tuple[Any, ...]]:
        """The properties that are narrowed, with their values, hashable."""
        found = {name: value for name, value in self.model_dump(exclude={"patch"}).items() if value is not None}
        if "offsets" in found:
            found["offsets"] = [tuple(map(float, one)) for one in found["offsets"]]
        return {name: tuple(values) for name, values in found.items()}


class SubjectFile(_Strict):
    """A whole file; an empty one maps nothing."""

    subject: About = About()
    names: dict[str, _Target] = Field(default_factory=dict)
    arguments: dict[str, dict[str, _Identifier | Literal[False]]] = Field(default_factory=dict)
    offers: Offers = Offers()


def read(file: Path) -> SubjectFile:
    """The validated content of ``file``.

    Raises ConfigurationError, in one sentence with the entry, its value and what is expected, for the first mistake.
    """
    found = validated(file, SubjectFile, _told)
    for table, names in ("names", found.names), ("arguments", found.arguments):
        for name in names:
            _known(file, name, table, _PUBLISHED, "a published name")
    for name, renamed in found.arguments.items():
        for parameter in renamed:
            _known(file, parameter, f"arguments.{name}", parameters_of(*name.rsplit(".", 1)), "a published parameter")
    for name in found.offers.patch:
        _known(file, name, "offers.patch", tuple(defaults_of(*PATCH)), "an option of the patch")
    if found.subject.profile is not None:
        _known(file, found.subject.profile, "subject.profile", tuple(PROFILES), "a profile")
    return found


def validated(file: Path, model: type[_Model], told: Callable[[ValidationError], str]) -> _Model:
    """The content of a TOML file. Raises ConfigurationError if it cannot be read, or with what is ``told`` of a mistake
    in its entries.
    """
    try:
        content = tomllib.loads(decoded(file.read_bytes()))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} cannot be read as TOML ({error}); repair it") from error
    except RecursionError:
        raise ConfigurationError(f"{file} cannot be read as TOML (nested too deeply); repair it") from None
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigurationError(f"{file}: {told(error)}") from error


def _known(file: Path, word: str, table: str, words: tuple[str, ...], what: str) -> None:
    if word not in words:
        near = difflib.get_close_matches(word, words, 1, 0.0)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ConfigurationError(f"{file}: {word!r} in [{table}] is not {what}{hint}")


_EXPECTED = {
    "names": "'module:attribute'",
    "arguments": "the subject's parameter, or false",
    "offers": "a list of the values that it takes",
    "subject": "a name",
}


def _told(error: ValidationError) -> str:
    first = error.errors()[0]
    table, *entry = map(str, first["loc"])
    where = ".".join((table, *entry[:1]))
    if first["type"] == "extra_forbidden":
        if entry:
            known = ", ".join({"subject": About, "offers": Offers}[table].model_fields)
            return f"{where} is not a known entry; [{table}] has {known}"
        return f"{where} is not a known entry; use [subject], [names], [arguments] and [offers]"
    return f"{where} is {reprlib.repr(first['input'])}; give {_EXPECTED.get(table, 'a table') if entry else 'a table'}"
