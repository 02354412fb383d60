"""``--hf-overrides`` and its relatives: what a server changes in a model's configuration, in vLLM's words."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from triattention.errors import TriAttentionError
from triattention.reading import parse_json

OPTION = "--hf-overrides"

_SCALED = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT])")


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("configuration of the model, as given to vLLM")
    group.add_argument(
        OPTION,
        type=overrides_of,
        metavar="JSON",
        help="entries of config.json to replace, such as '{\"rope_parameters\": {...}}'; also as "
        f"{OPTION}.rope_parameters.factor 4.0",
    )
    group.add_argument(
        "--hf-config-path", metavar="M", help="take config.json from this directory or hub name (default: --model)"
    )
    group.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub model (default: main)")


def overrides_of(text: str) -> dict[str, Any]:
    """The overrides in a JSON text. Raises ArgumentTypeError."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is {error}; give a JSON object in quotes") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a JSON object; give one such as '{{\"rms_norm_eps\": 1e-6}}'"
        )
    return value


def joined(words: Sequence[str]) -> list[str]:
    """``words``, with ``--hf-overrides.a.b VALUE`` as one ``--hf-overrides {"a": {"b": VALUE}}``, as vLLM reads it.

    Raises TriAttentionError for a word without a value, an entry given twice, or both forms at once.
    """
    found: dict[str, Any] = {}
    rest: list[str] = []
    given = iter(words)
    for word in given:
        name, equals, value = word.partition("=")
        name = name.replace("--hf_overrides", OPTION, 1)
        if name == OPTION:
            rest.append(f"{name}{equals}{value}")
        elif not name.startswith(f"{OPTION}."):
            rest.append(word)
        else:
            if not equals and (value := next(given, None)) is None:
                raise TriAttentionError(f"{name} has no value; give one, such as {name} 4.0")
            _put(found, name, value)
    whole = sum(word.partition("=")[0] == OPTION for word in rest)
    if whole > 1:
        raise TriAttentionError(f"{OPTION} is given {whole} times, of which the last would count; give one")
    if not found:
        return rest
    if whole:
        raise TriAttentionError(f"{OPTION} is given both as JSON and with dots; give one of them")
    return [*rest, f"{OPTION}={json.dumps(found)}"]


def _scaled(text: str) -> int | str:
    """A number such as 128k (thousands) or 128K (of 1024); any other word as it is, such as yarn."""
    if not (found := _SCALED.fullmatch(text)) or ("." in found[1] and found[2].isupper()):
        return text
    power = 1 + "kmgt".index(found[2].lower())
    return int(found[1]) * 1024**power if found[2].isupper() else int(float(found[1]) * 1000**power)


def _put(overrides: dict[str, Any], name: str, text: str) -> None:
    *path, last = name.removeprefix(f"{OPTION}.").split(".")
    if not all((*path, last.removesuffix("+"))):
        raise TriAttentionError(f"{name} has an empty name; write it as {OPTION}.rope_parameters.factor 4.0")
    value: Any = text
    if last.endswith("+"):
        last, value = last[:-1], text.split(",")
    else:
        try:
            value = parse_json(text)
        except ValueError:
            value = _scaled(text)
    for key in path:
        overrides = overrides.setdefault(key, {})
        if not isinstance(overrides, dict):
            raise TriAttentionError(f"{name}: {key!r} has a value and entries of its own; give one of them")
    if last in overrides:
        raise TriAttentionError(f"{name} is given twice; remove one")
    overrides[last] = value
