"""``subject.toml``: the names in a subject that differs from the published layout.

[subject]                  # all optional
package = "theirs"         # the package in the role of triattention; for a checkout only
name = "Theirs"            # how a record names it
version = "1.2"

[names]                    # published name = "module:attribute" in the subject
"vllm.core.scoring.compute_scores" = "theirs.scores:score"
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from verify.errors import ConfigurationError
from verify.subject.published import NAMES, OPTIONAL

FILE = "subject.toml"

_Dotted = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]
_Target = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
_Word = Annotated[str, StringConstraints(min_length=1)]

_PUBLISHED = tuple(f"{name.module}.{name.name}" for name in (*NAMES, *OPTIONAL))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class About(_Strict):
    """The subject itself."""

    package: _Dotted | None = None
    name: _Word | None = None
    version: _Word | None = None


class SubjectFile(_Strict):
    """A whole file; an empty one maps nothing."""

    subject: About = About()
    names: dict[str, _Target] = Field(default_factory=dict)


def read(file: Path) -> SubjectFile:
    """The validated content of ``file``.

    Raises ConfigurationError, in one sentence with the entry, its value and what is expected, for the first mistake.
    """
    try:
        found = SubjectFile.model_validate(tomllib.loads(file.read_text("utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read as TOML ({error}); repair it") from error
    except ValidationError as error:
        raise ConfigurationError(f"{file}: {_told(error)}") from error
    for name in found.names:
        if name not in _PUBLISHED:
            near = difflib.get_close_matches(name, _PUBLISHED, 1, 0.0)[0]
            raise ConfigurationError(f"{file}: {name!r} in [names] is not a published name; the nearest is {near!r}")
    return found


def _told(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{where} is not a known entry; use [subject] with package, name, version, and [names]"
    expected = "'module:attribute'" if where.startswith("names.") else "a table" if "." not in where else "a name"
    return f"{where} is {first['input']!r}; give {expected}"
