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

_NULL, _BOOL, *_OTHERS = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "str", "int", "float", "timestamp"))
_SCALARS = (_NULL, _BOOL, *_OTHERS)
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

    loader = yaml.SafeLoader(read_text(path, _OPTION, "give a YAML file"))
    try:
        root = loader.get_single_node()
        if root is None or root.tag == _NULL:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise TriAttentionError(
                f"{_OPTION} {path} is not a mapping; write one option on each line, such as 'budget: 1024'"
            )
        _require_unrepeated(root, str(path))
        loader.flatten_mapping(root)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise TriAttentionError(f"{_OPTION} {path} is not one YAML mapping ({reason}); correct it") from error
    finally:
        loader.dispose()
    found: dict[str, _Value] = {}
    off = []
    for key_node, node in root.value:
        where, key = f"{_OPTION} {path}, line {key_node.start_mark.line + 1}", key_node.value
        if mode := _PUBLISHED_MODES.get(key):
            if node.tag != _BOOL:
                raise TriAttentionError(f"{where}: {key!r} is {_shown(node)}; give true or false")
            if not _is_true(node):
                off.append(key)
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
    if len(off) == len(_PUBLISHED_MODES) and "--pruning-mode" not in found:
        raise TriAttentionError(f"{_OPTION} {path}: {' and '.join(off)} are both false; write 'pruning-mode: union'")
    return found


@dataclass(frozen=True, slots=True)
class _Value:
    """The value of an option in a file: the word for the command line, None for a flag that is left out.

    ``key`` is what the file calls the option.
    """

    key: str
    word: str | None


def _require_unrepeated(mapping: Any, source: str) -> None:
    """Raise TriAttentionError if a mapping node has two equal keys, of which YAML readers keep the last."""
    lines: dict[str, int] = {}
    for key, _ in mapping.value:
        line = key.start_mark.line + 1
        if not isinstance(key.value, str):
            raise TriAttentionError(f"{_OPTION} {source}, line {line}: a key is not text; write 'option: value'")
        if key.value in lines:
            raise TriAttentionError(
                f"{_OPTION} {source} has {key.value!r} twice, in lines {lines[key.value]} and {line}; remove one"
            )
        lines[key.value] = line


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
    if node.id == "mapping":
        if action.type is not overrides_of:
            inside = ", ".join(str(inner.value) for inner, _ in node.value[:3])
            raise TriAttentionError(
                f"{where}: {key!r} contains options of its own ({inside}); move them to the left margin"
            )
        return f"{option}={json.dumps(_plain(node, where))}"
    items = node.value if node.id == "sequence" else [node]
    for item in items:
        if (
            item.id != "scalar"
            or item.tag not in _SCALARS
            or (item.tag == _BOOL and item.value.lower() in _WORDS_OF_BOTH)
        ):
            raise TriAttentionError(f"{where}: {key!r} is {_shown(node)}; give one value")
        if node.id == "sequence" and "," in item.value:
            raise TriAttentionError(f"{where}: {key!r} has {_shown(item)} with a comma in it; give one value per item")
    return f"{option}={','.join(item.value for item in items)}"


def _plain(node: Any, where: str) -> Any:
    """A node as JSON would hold it: numbers as in JSON, not as in YAML 1.1."""
    if node.id == "mapping":
        _require_unrepeated(node, where)
        return {key.value: _plain(value, where) for key, value in node.value}
    if node.id == "sequence":
        return [_plain(item, where) for item in node.value]
    if node.tag not in _SCALARS:
        raise TriAttentionError(f"{where}: {_shown(node)} has the tag {node.tag!r}; give text or a number")
    if node.style is None and (node.tag == _NULL or node.value in ("true", "false") or _NUMBER.fullmatch(node.value)):
        return parse_json("null" if node.tag == _NULL else node.value)
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
