"""``python -m verify init``: a subject whose functions are stubs, ready to be filled in and judged from the start."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent, wrap

from verify.checks import PROFILES
from verify.errors import ConfigurationError
from verify.files import expanded
from verify.record.grounds import PACKAGE
from verify.subject.contract import EVERY, meaning_of, option_meaning, sections_of, template
from verify.subject.meanings import MEANINGS
from verify.subject.published import CONFIG_DEFAULTS, Name, parameters_of

#: What cannot be a stub: vLLM would load it, and the other is the package's ``__main__``.
_WITHOUT_STUBS = {"plugin", "command_line"}

_OPTIONS = "vllm.core.config"

#: The fields without a published default, before the others or after them.
_FIRST = {"methods.triattention": ("stats_path", "model_path", "device", "dtype", "budget")}
_LAST = {
    "methods.triattention": {"pruning_seed": "int = 0", "metadata_expectations": "Any = None"},
    _OPTIONS: {
        "window_size": "int | None = None",
        "topk_dtype": "torch.dtype = torch.float32",
        "compute_dtype": "torch.dtype = torch.bfloat16",
        "position_indices_dtype": "torch.dtype = torch.int32",
        "device": 'Any = "cuda"',
    },
}


def init(folder: Path, profile: str, name: str | None = None) -> int:
    """Write a subject into ``folder``, which is new or empty, and say how to go on; return 0.

    Nothing is left behind if it cannot be written. Raises ConfigurationError then.
    """
    folder = expanded(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} exists and is not an empty directory; give a new one")
    contents = files(name or folder.name, profile)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
            for place, text in contents.items():
                (Path(made) / place).parent.mkdir(parents=True, exist_ok=True)
                (Path(made) / place).write_text(text, "utf-8")
            _move(Path(made), folder)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written ({error.strerror}); choose another place") from error
    print(f"{len(contents)} files in {folder}; README.md says how to go on.")
    print(f"Next: python -m verify doctor --subject {folder} --profile {profile}")
    return 0


def _move(made: Path, folder: Path) -> None:
    """Move everything from one folder into another, or nothing."""
    moved = []
    try:
        for entry in made.iterdir():
            moved.append(entry.rename(folder / entry.name))
    except BaseException:
        for entry in moved:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        raise


def files(name: str, profile: str) -> dict[str, str]:
    """The files of a subject with this name in records, by their place in its folder."""
    found = {
        "README.md": _filled("README.md", name, profile),
        "subject.toml": _filled("subject.toml", json.dumps(name, ensure_ascii=False), profile),
        ".github/workflows/conformance.yml": _filled("conformance.yml", name, profile),
    }
    modules: dict[str, list[Name]] = {}
    for one in _stubs(profile):
        modules.setdefault(one.module, []).append(one)
    for module, names in modules.items():
        *packages, last = module.split(".")
        for depth in range(len(packages) + 1):
            inner = "/".join([PACKAGE, *packages[:depth]])
            found[f"{inner}/__init__.py"] = "" if depth else '__version__ = "0.1.0"\n'
        found["/".join([PACKAGE, *packages, f"{last}.py"])] = _module(names)
    return found


def _filled(name: str, subject: str, profile: str) -> str:
    return template(name).replace("{name}", subject).replace("{profile}", profile)


def _stubs(profile: str) -> Iterator[Name]:
    """The names that a subject with a profile can offer, with the configuration that a compressor is made with."""
    wanted = {name for group in PROFILES[profile] for name in group} - _WITHOUT_STUBS
    for name in EVERY:
        if name.capability in wanted or (name.module == _OPTIONS and "compressor" in wanted):
            yield name


def _module(names: list[Name]) -> str:
    imports = ["import torch"]
    if any(name.name == "TriAttentionConfig" for name in names):
        imports = ["from dataclasses import asdict, dataclass", "from typing import Any", "", *imports]
    return "\n".join(imports) + "\n" + "".join(f"\n\n{_stub(name)}" for name in names)


def _stub(name: Name) -> str:
    about = MEANINGS[name.full]
    if name.name == "TriAttentionConfig":
        return _configuration(name)
    if not about.methods:
        return _function(f"{name.name}({name.parameters})", _docstring(name, about.returns))
    methods = [_function(f"__init__(self, {name.parameters})", "", name.name)]
    for signature, returns in about.methods.items():
        method, _, rest = signature.partition("(")
        lines = _wrapped(f'"""Returns {returns}.', 108)
        told = "\n".join(lines) + ('"""\n' if len(lines) == 1 else '\n"""\n')
        methods.append(_function(f"{method}(self{'' if rest == ')' else ', '}{rest}", told))
    body = "\n".join([_docstring(name, ""), *methods])
    return f"class {name.name}:\n{indent(body, '    ')}"


def _function(signature: str, docstring: str, what: str = "") -> str:
    name, _, parameters = signature.removesuffix(")").partition("(")
    if len(signature) > 100:
        parameters = "\n" + "".join(f"    {line}\n" for line in wrap(f"{parameters},", 112))
    stub = f'raise NotImplementedError("{what or name} is not written yet")\n'
    return f"def {name}({parameters}):\n{indent(docstring + stub, '    ')}"


def _docstring(name: Name, returns: str) -> str:
    """What a stub is to do: the meaning of each parameter, of the result, and where that is defined."""
    lines = [*_wrapped(f'"""{MEANINGS[name.full].purpose}', 112), ""]
    for parameter in parameters_of(name.module, name.name):
        lines += _wrapped(f"{parameter}: {meaning_of(name, parameter)}.", 112)
    lines += ["", *_wrapped(f"Returns {returns}.", 112)] if returns else [""]
    lines += [f"See {sections_of(name)} of `python -m verify contract`.", '"""']
    return "".join(f"{line}\n" for line in lines)


def _configuration(name: Name) -> str:
    defaults = {
        option: f"{'Any' if value is None else type(value).__name__} = {value!r}"
        for option, value in CONFIG_DEFAULTS[name.module].items()
    }
    fields = {**dict.fromkeys(_FIRST.get(name.module, ()), "Any"), **defaults, **_LAST[name.module]}
    lines = [f"    {option}: {declared}  # {option_meaning(option)}\n" for option, declared in fields.items()]
    head = f'@dataclass\nclass TriAttentionConfig:\n    """{MEANINGS[name.full].purpose}"""\n\n'
    return head + "".join(lines) + (template("options.py.txt") if name.module == _OPTIONS else "")


def _wrapped(text: str, width: int) -> list[str]:
    return wrap(text, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
