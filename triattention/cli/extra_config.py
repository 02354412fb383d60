"""``--extra-config``: options from YAML files, inserted as command-line words before those the user typed.

So values are checked like typed ones, the command line overrides a file, and a later file an earlier one.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from triattention.errors import TriAttentionError
from triattention.files import expanded

_OPTION = "--extra-config"


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        _OPTION,
        action="append",
        metavar="YAML",
        help="a file of options, such as 'budget: 1024' (repeatable: a later file overrides an earlier one, and the "
        "command line overrides both)",
    )


def expand(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """``words``, preceded by the options in their extra configurations; ``parser`` is that of their verb.

    Raises TriAttentionError for a file that cannot be read, or contains anything but options of that verb.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(_OPTION, action="append", default=[])
    merged: dict[str, Any] = {}
    known = {string: action for action in parser._actions for string in action.option_strings}
    for name in finder.parse_known_args(words)[0].extra_config:
        merged |= _read(expanded(name), known, parser.prog.rpartition(" ")[2])
    return [word for option, value in merged.items() for word in _words(option, value, known[option])] + [*words]


def _read(path: Path, known: Mapping[str, argparse.Action], verb: str) -> dict[str, Any]:
    """The values in a file by option, such as ``--max-questions``."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise TriAttentionError(f"cannot read {_OPTION} {path}: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise TriAttentionError(f"{_OPTION} {path} is not YAML ({reason}); correct it") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise TriAttentionError(
            f"{_OPTION} {path} contains a {type(content).__name__}, not a mapping; write one option on each line, such "
            "as 'budget: 1024'"
        )
    found: dict[str, Any] = {}
    for key, value in content.items():
        option = f"--{str(key).replace('_', '-')}"
        if option not in known or option in ("--help", _OPTION):
            raise TriAttentionError(f"{_OPTION} {path}: {_unknown(str(key), known, verb)}")
        if option in found:
            raise TriAttentionError(f"{_OPTION} {path} has {key!r} twice, with a dash and an underscore; remove one")
        _check(path, key, value, known[option])
        found[option] = value
    return found


def _unknown(key: str, known: Mapping[str, argparse.Action], verb: str) -> str:
    names = [option.removeprefix("--") for option in known if option.startswith("--")]
    names = [name for name in names if name not in ("help", _OPTION.removeprefix("--"))]
    near = difflib.get_close_matches(key.replace("_", "-"), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(names)}"
    return f"{key!r} is not an option of {verb}; {hint}"


def _check(path: Path, key: str, value: Any, action: argparse.Action) -> None:
    """Raise TriAttentionError for a value of the wrong type; argparse checks its content."""
    is_flag = action.nargs == 0
    if value is None or (isinstance(value, bool) == is_flag and isinstance(value, bool | int | float | str)):
        return
    if isinstance(value, list) and not is_flag and all(isinstance(item, int | float | str) for item in value):
        return
    wanted = "true or false" if is_flag else "one value"
    raise TriAttentionError(f"{_OPTION} {path}: {key!r} is {value!r}; give {wanted}")


def _words(option: str, value: Any, action: argparse.Action) -> list[str]:
    if value is None or (value is False and not isinstance(action, argparse.BooleanOptionalAction)):
        return []
    if isinstance(value, bool):
        return [option if value else option.replace("--", "--no-", 1)]
    return [f"{option}={','.join(map(str, value)) if isinstance(value, list) else value}"]
