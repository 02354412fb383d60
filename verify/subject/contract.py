"""``python -m verify contract``: the published API in words, from ``meanings`` and ``templates/contract.md``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.resources import files

from verify.checks import CAPABILITIES, PROFILES
from verify.subject.meanings import MEANINGS, OPTIONS, PARAMETERS
from verify.subject.published import CONFIG_DEFAULTS, NAMES, OPTIONAL, Name, parameters_of

#: The names by which the API is described: a capability has all that are about it.
EVERY = (*NAMES, *OPTIONAL)

_FENCE = "```"


def contract(form: str = "text") -> int:
    """Print the contract; return 0."""
    print(page() if form == "markdown" else _plain(page()), end="")
    return 0


def page() -> str:
    """``docs/contract.md``: the standard, then every published name by capability, then the options."""
    standard = template("contract.md").replace("{profiles}", "\n".join(_profiles()))
    parts = [standard, "## Names\n\nA name is `module.attribute` in the package.\n"]
    for capability, words in CAPABILITIES.items():
        names = [name for name in EVERY if name.capability == capability]
        if names:
            parts += [f"### {words[0].upper()}{words[1:]} (`{capability}`)\n", *map(_entry, names)]
    parts += ["## Options\n", *_options()]
    return "\n".join(parts)


def template(name: str) -> str:
    return (files("verify.subject") / "templates" / name).read_text("utf-8")


def meaning_of(name: Name, parameter: str) -> str:
    return {**PARAMETERS, **MEANINGS[name.full].parameters}[parameter]


def option_meaning(option: str) -> str:
    return {**PARAMETERS, **OPTIONS}[option]


def sections_of(name: Name) -> str:
    """``sections 3 and 4``."""
    *first, last = map(str, MEANINGS[name.full].sections)
    return f"sections {', '.join(first)} and {last}" if first else f"section {last}"


def _profiles() -> Iterator[str]:
    for profile, groups in PROFILES.items():
        asked = "; ".join(" or ".join(CAPABILITIES[name] for name in group) for group in groups)
        yield f"| `{profile}` | {asked} |"


def _entry(name: Name) -> str:
    about = MEANINGS[name.full]
    head = f"#### `{name.full}`\n\n{about.purpose} {sections_of(name).capitalize()}.\n"
    calls = "" if name.parameters is None else f"{_FENCE}\n{name.name}({name.parameters})\n{_FENCE}\n"
    lines = [f"* `{one}`: {meaning_of(name, one)}" for one in parameters_of(name.module, name.name)]
    lines += [f"* it returns {about.returns}"]
    lines += [f"* its method `{signature}` returns {returns}" for signature, returns in about.methods.items()]
    return "\n".join(filter(None, [head, calls, *lines])) + "\n"


def _options() -> Iterator[str]:
    for module, defaults in CONFIG_DEFAULTS.items():
        yield f"### `{module}.TriAttentionConfig`\n\n{_table(defaults)}"


def _table(defaults: Mapping[str, object]) -> str:
    lines = [f"| `{name}` | `{value!r}` | {option_meaning(name)} |\n" for name, value in defaults.items()]
    return "".join(["| option | default | meaning |\n| --- | --- | --- |\n", *lines])


def _plain(markdown: str) -> str:
    """The page without its marks, for a terminal."""
    lines = (line for line in markdown.splitlines() if not re.match(rf"{_FENCE}|\|( -+ \|)+$", line))
    shown = "\n".join(re.sub(r"^#+ ", "", line).replace("**", "").replace("\\|", "|") for line in lines)
    return re.sub(r"`([^`]*)`", r"\1", shown) + "\n"
