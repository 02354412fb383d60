"""``--extra-config``: options from YAML files, inserted as command-line words before those the user typed.

So values are checked like typed ones, the command line overrides a file, and a later file an earlier one.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triattention.cli.overrides import overrides_of
from triattention.errors import TriAttentionError
from triattention.files import expanded
from triattention.reading import parse_json, read_text

_OPTION = "--extra-config"

_NULL, _BOOL, _MERGE, _MAP, _SEQ = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "merge", "map", "seq"))
#: The truth values of YAML 1.1 and 1.2; yes, no, on and off are text in 1.2.
_WORDS_OF_BOTH = ("true", "false")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")

#: Options under the names of the published command line.
_PUBLISHED = {
    "triattention_stats_file": "stats-path", "load_dtype": "dtype", "eval_batch_size": "batch-size",
    "kv_budget": "budget", "max_examples": "max-questions", "model_path": "model", "dataset_path": "dataset",
}  # fmt: skip
#: Its switches that choose a keep-set mode; one that is false chooses nothing.
_PUBLISHED_MODES = {"per_head_pruning": "per_head", "per_layer_perhead_pruning": "per_layer_per_head"}


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
    merged: dict[str, _Value] = {}
    known = {string: action for action in parser._actions for string in action.option_strings}
    for name in finder.parse_known_args(words)[0].extra_config:
        merged |= _read(expanded(name), known, parser.prog.rpartition(" ")[2])
    return [value.word for value in merged.values() if value.word is not None] + [*words]


def _read(path: Path, known: Mapping[str, argparse.Action], verb: str) -> dict[str, _Value]:
    """The values in a file by option, such as ``--max-questions``."""
    import yaml

    source, text = f"{_OPTION} {path}", read_text(path, _OPTION, "give a YAML file")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None or root.tag == _NULL:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise TriAttentionError(f"{source} is not a mapping; write one option on each line, such as 'budget: 1024'")
        return _options(root, source, known, verb)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise TriAttentionError(f"{source} is not one YAML mapping ({reason}); correct it") from error
    except RecursionError:
        raise TriAttentionError(f"{source} is nested too deeply, or contains itself; correct it") from None


def _options(root: Any, source: str, known: Mapping[str, argparse.Action], verb: str) -> dict[str, _Value]:
    found: dict[str, _Value] = {}
    off = []
    for key_node, node in _entries(root, source):
        where, key = f"{source}, line {key_node.start_mark.line + 1}", key_node.value
        if mode := _PUBLISHED_MODES.get(key):
            if node.tag != _BOOL:
                raise TriAttentionError(f"{where}: {key!r} is {_shown(node)}; give true or false")
            if not _is_true(node):
                off.append((key, mode))
                continue
            key = "pruning-mode"
        option = f"--{_PUBLISHED.get(key, key).replace('_', '-')}"
        if option not in known or option in ("--help", _OPTION):
            raise TriAttentionError(f"{where}: {_unknown(key, known, verb)}")
        if option in found and found[option].key != key_node.value:
            raise TriAttentionError(
                f"{where}: {key_node.value!r} and {found[option].key!r} are the same option; remove one"
            )
        word = f"{option}={mode}" if mode else _word(option, key, node, known[option], where)
        found[option] = _Value(key_node.value, word)
    chosen = found.get("--pruning-mode")
    for key, mode in off:
        if chosen is None or chosen.word == f"--pruning-mode={mode}":
            raise TriAttentionError(
                f"{source}: {key!r} is false, which leaves the mode open; add 'pruning-mode: union'"
            )
    return found


@dataclass(frozen=True, slots=True)
class _Value:
    """The value of an option in a file: the word for the command line, None for a flag that is left out.

    ``key`` is what the file calls the option.
    """

    key: str
    word: str | None


def _entries(mapping: Any, source: str) -> list[tuple[Any, Any]]:
    """The keys and values of a mapping node, merge keys (``<<``) resolved; an own entry wins over a merged one.

    Raises TriAttentionError for two equal keys, of which YAML readers keep the last.
    """
    from yaml.constructor import SafeConstructor

    merged = [value for key, value in mapping.value if key.tag == _MERGE]
    for part in (mapping, *(one for value in merged for one in (value.value if value.id == "sequence" else [value]))):
        lines: dict[str, int] = {}
        for key, _ in part.value if part.id == "mapping" else ():
            line = key.start_mark.line + 1
            if not isinstance(key.value, str):
                raise TriAttentionError(f"{source}, line {line}: a key is not text; write 'option: value'")
            if key.value in lines:
                where = f"lines {lines[key.value]} and {line}" if line > lines[key.value] else f"line {line}"
                raise TriAttentionError(f"{source} has {key.value!r} twice, in {where}; remove one")
            lines[key.value] = line
    SafeConstructor().flatten_mapping(mapping)
    return list({key.value: (key, value) for key, value in mapping.value}.values())


def _is_tagged(node: Any) -> bool:
    """Whether a node has a tag of its own, such as ``!!str``."""
    from yaml.resolver import Resolver

    if node.id != "scalar":
        return node.tag not in (_MAP, _SEQ)
    return node.tag != Resolver().resolve(type(node), node.value, (node.style is None, node.style is not None))


def _word(option: str, key: str, node: Any, action: argparse.Action, where: str) -> str | None:
    """The word for the command line; None if there is none. Raises TriAttentionError for a value of the wrong kind.

    Scalars count as they are written, because argparse converts them: 010 is 10, and 1:30 is not 90.
    """
    if node.tag == _NULL:
        return None
    if action.nargs == 0:
        if node.tag != _BOOL:
            raise TriAttentionError(f"{where}: {key!r} is {_shown(node)}; give true or false")
        if _is_true(node):
            return option
        return option.replace("--", "--no-", 1) if isinstance(action, argparse.BooleanOptionalAction) else None
    if action.type is overrides_of and node.id == "mapping":
        return f"{option}={json.dumps(_plain(node, where.rpartition(', line ')[0]))}"
    if node.id == "mapping":
        inside = ", ".join(str(inner.value) for inner, _ in node.value[:3])
        raise TriAttentionError(
            f"{where}: {key!r} contains options of its own ({inside}); move them to the left margin"
        )
    items = node.value if node.id == "sequence" else [node]
    for item in items:
        if item.id != "scalar" or _is_tagged(item) or (item.tag == _BOOL and item.value.lower() in _WORDS_OF_BOTH):
            raise TriAttentionError(f"{where}: {key!r} is {_shown(node)}; give one value")
        if node.id == "sequence" and "," in item.value:
            raise TriAttentionError(f"{where}: {key!r} has {_shown(item)} with a comma in it; give one value per item")
    word = ",".join(item.value for item in items)
    _require_accepted(key, word, action, where)
    return f"{option}={word}"


def _require_accepted(key: str, word: str, action: argparse.Action, where: str) -> None:
    """Raise TriAttentionError for a word that argparse would refuse, which does not know the file."""
    try:
        value = action.type(word) if callable(action.type) else word
    except argparse.ArgumentTypeError as error:
        raise TriAttentionError(f"{where}: {key!r}: {error}") from error
    except ValueError as error:
        kind = {int: "a whole number", float: "a number"}.get(action.type, "another value")
        raise TriAttentionError(f"{where}: {key!r} is {reprlib.repr(word)}; give {kind}") from error
    if action.choices is not None and value not in action.choices:
        raise TriAttentionError(f"{where}: {key!r} is {word!r}; give one of {', '.join(map(str, action.choices))}")


def _plain(node: Any, source: str) -> Any:
    """A node as JSON would hold it: numbers as in JSON, not as in YAML 1.1."""
    where = f"{source}, line {node.start_mark.line + 1}"
    if _is_tagged(node):
        raise TriAttentionError(f"{where}: {_shown(node)} has the tag {node.tag!r}; write it without")
    if node.id == "mapping":
        return {key.value: _plain(value, source) for key, value in _entries(node, source)}
    if node.id == "sequence":
        return [_plain(item, source) for item in node.value]
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL and node.value.lower() in _WORDS_OF_BOTH:
        return _is_true(node)
    if node.style is None and _NUMBER.fullmatch(node.value):
        try:
            return parse_json(node.value)
        except ValueError as error:
            raise TriAttentionError(f"{where}: {error}; give a smaller number") from error
    return node.value


def _is_true(node: Any) -> bool:
    return node.value.lower() in ("true", "yes", "on")


def _shown(node: Any) -> str:
    return reprlib.repr(node.value) if node.id == "scalar" else f"a {node.id}"


def _unknown(key: str, known: Mapping[str, argparse.Action], verb: str) -> str:
    names = [option.removeprefix("--") for option in known if option.startswith("--")]
    names = [name for name in names if name not in ("help", _OPTION.removeprefix("--"))]
    near = difflib.get_close_matches(key.replace("_", "-"), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(names)}"
    return f"{key!r} is not an option of {verb}; {hint}"
