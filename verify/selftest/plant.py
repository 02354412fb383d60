"""Copies of a subject with one fault in them."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import libcst as cst

from verify.errors import ConfigurationError
from verify.selftest.faults import WRAPPERS, Edit, Fault
from verify.subject.subject import Subject
from verify.subject.toml import FILE

_PLANTED = "_planted_fault"


def copy_of(subject: Subject, folder: Path, fault: Fault | None = None) -> Path:
    """A directory with a copy of the subject's package, and the fault in it if one is given.

    Raises ConfigurationError, which says what to edit, for a fault that does not apply to this subject.
    """
    package = folder.joinpath(*subject.package.split("."))
    shutil.copytree(subject.folder, package, ignore=shutil.ignore_patterns("tests", "__pycache__"))
    if (names := subject.root / FILE).is_file():
        shutil.copy(names, folder)
    if fault is not None:
        for edit in fault.edits_of(subject_key(subject)):
            _edit(package / edit.file, edit, fault)
        if fault.wrapper is not None:
            _wrap(package, subject.package, fault)
    return folder


def subject_key(subject: Subject) -> str:
    """The name under which faults have edits for a subject: ``bundled``, or that of its directory."""
    return subject.name if subject.name == "bundled" else subject.root.name


def _wrap(package: Path, name: str, fault: Fault) -> None:
    """Copy the wrapper's module into the package, and make the module it is around pass its names to ``plant``."""
    around = package.joinpath(*fault.wrapper.around.split("."))
    source = around / "__init__.py" if around.is_dir() else around.with_suffix(".py")
    if not source.is_file():
        raise _does_not_apply(fault, f"the subject has no module {fault.wrapper.around}", "around")
    shutil.copy(WRAPPERS / f"{fault.wrapper.module}.py", package / f"{_PLANTED}.py")
    with source.open("a", encoding="utf-8") as module:
        module.write(f"\nfrom {name}.{_PLANTED} import plant\n\nplant(globals())\n")


def _edit(path: Path, edit: Edit, fault: Fault) -> None:
    if not path.is_file():
        raise _does_not_apply(fault, f"the subject has no file {edit.file}", "file")
    path.write_text(edited(path.read_text("utf-8"), edit, fault), "utf-8")


def edited(text: str, edit: Edit, fault: Fault) -> str:
    """The source ``text`` with one edit.

    Raises ConfigurationError if ``within`` is missing, or ``before`` does not occur exactly once, or ``nth`` times.
    """
    module = cst.parse_module(text)
    scope = _scope(module, edit.within)
    if scope is None:
        raise _does_not_apply(fault, f"{edit.file} has no {edit.within}", "within")
    wanted, meaning = _parsed(edit.before, fault, "before"), _meaning(edit.before)
    alike = (node for node in _below(scope) if type(node) is type(wanted))
    found = [node for node in alike if _meaning(module.code_for_node(node)) == meaning]
    if not (len(found) == 1 if edit.nth is None else len(found) >= edit.nth):
        place = f"{edit.file}, {edit.within}" if edit.within else edit.file
        raise _does_not_apply(
            fault, f"{place} has {edit.before!r} {len(found)} times", "before" if not found else "nth"
        )
    new = _parsed(edit.after, fault, "after")
    if isinstance(new, cst.BaseStatement) is not isinstance(wanted, cst.BaseStatement):
        new = _as_statement(edit, fault)
    return module.deep_replace(found[(edit.nth or 1) - 1], new).code


def _does_not_apply(fault: Fault, why: str, field: str) -> ConfigurationError:
    return ConfigurationError(
        f"fault {fault.id} no longer applies: {why}; edit its {field!r} in faults/{fault.layer}.toml"
    )


def _scope(node: cst.CSTNode, within: str) -> cst.CSTNode | None:
    """The function or class of that dotted name; the first one if it is defined twice."""
    for name in filter(None, within.split(".")):
        inner = _below(node)
        node = next((x for x in inner if isinstance(x, cst.FunctionDef | cst.ClassDef) and x.name.value == name), None)
        if node is None:
            return None
    return node


def _below(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    for child in node.children:
        yield child
        yield from _below(child)


def _parsed(source: str, fault: Fault, field: str) -> cst.CSTNode:
    """An expression, in parentheses, or a statement. Raises ConfigurationError for what is neither."""
    with suppress(cst.ParserSyntaxError):
        return cst.parse_expression(f"({source.strip()})")
    with suppress(cst.ParserSyntaxError):
        return cst.parse_statement(source.strip())
    raise ConfigurationError(
        f"fault {fault.id}: {field!r} is neither an expression nor a statement; edit it in faults/{fault.layer}.toml"
    )


def _as_statement(edit: Edit, fault: Fault) -> cst.CSTNode:
    """``after``, an expression, as the statement that ``before`` is. Raises ConfigurationError the other way round."""
    try:
        cst.parse_expression(f"({edit.before.strip()})")
    except cst.ParserSyntaxError:
        return cst.parse_statement(edit.after.strip())
    raise ConfigurationError(
        f"fault {fault.id}: 'before' is an expression and 'after' a statement; edit one in faults/{fault.layer}.toml"
    )


def _meaning(source: str) -> str:
    """The syntax tree of a piece of source, whatever its formatting; empty if it does not parse by itself."""
    for text, mode in ((f"({source}\n)", "eval"), (source.strip(), "exec")):
        with suppress(SyntaxError):
            return ast.dump(ast.parse(text, mode=mode))
    return ""
