"""Copies of a subject with one fault in them."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import libcst as cst

from verify.outcome import ConfigurationError
from verify.selftest.faults import WRAPPERS, Edit, Fault
from verify.subject import PACKAGE, Subject

_PLANTED = "_planted_fault"


def copy_of(subject: Subject, folder: Path, fault: Fault | None = None) -> Path:
    """A directory with a copy of the subject's package, and the fault in it if one is given.

    Raises ConfigurationError, which says what to edit, for a fault that does not apply to this subject.
    """
    shutil.copytree(
        subject.root / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("tests", "__pycache__")
    )  # fmt: skip
    if fault is not None:
        package = folder / PACKAGE
        for edit in fault.edits_of(subject_key(subject)):
            _edit(package / edit.file, edit, fault)
        if fault.wrapper is not None:
            _wrap(package, fault)
    return folder


def subject_key(subject: Subject) -> str:
    """The name under which faults have edits for a subject: ``bundled``, or that of its directory."""
    return subject.name if subject.name == "bundled" else subject.root.name


def _wrap(package: Path, fault: Fault) -> None:
    """Put the wrapper's module beside the subject's, and have the module it is around hand over its names."""
    around = package.joinpath(*fault.wrapper.around.split("."))
    source = around / "__init__.py" if around.is_dir() else around.with_suffix(".py")
    if not source.is_file():
        raise _does_not_apply(fault, f"the subject has no module {fault.wrapper.around}", "around")
    shutil.copy(WRAPPERS / f"{fault.wrapper.module}.py", package / f"{_PLANTED}.py")
    with source.open("a", encoding="utf-8") as module:
        module.write(f"\nfrom {PACKAGE}.{_PLANTED} import plant\n\nplant(globals())\n")


def _edit(path: Path, edit: Edit, fault: Fault) -> None:
    if not path.is_file():
        raise _does_not_apply(fault, f"the subject has no file {edit.file}", "file")
    path.write_text(edited(path.read_text("utf-8"), edit, fault), "utf-8")


def edited(text: str, edit: Edit, fault: Fault) -> str:
    """The source ``text`` with one edit.

    Raises ConfigurationError where ``within`` is not there, or ``before`` is not there exactly once, or ``nth`` times.
    """
    module = cst.parse_module(text)
    scope = _scope(module, edit.within)
    if scope is None:
        raise _does_not_apply(fault, f"{edit.file} has no {edit.within}", "within")
    wanted, statement = _meaning(edit.before)
    found = [node for node in _nodes(scope, statement) if _meaning_of(module, node, statement) == wanted]
    if not (len(found) == 1 if edit.nth is None else len(found) >= edit.nth):
        place = f"{edit.file}, {edit.within}" if edit.within else edit.file
        raise _does_not_apply(
            fault, f"{place} has {len(found)} times {edit.before!r}", "before" if not found else "nth"
        )
    new = _new(edit.after, statement, fault)
    return module.deep_replace(found[(edit.nth or 1) - 1], new).code


def _does_not_apply(fault: Fault, why: str, field: str) -> ConfigurationError:
    return ConfigurationError(
        f"fault {fault.id} no longer applies: {why}; edit its {field!r} in faults/{fault.layer}.toml"
    )


def _scope(node: cst.CSTNode, within: str) -> cst.CSTNode | None:
    """The function or class of that dotted name; the first one, where it is defined twice."""
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


def _nodes(scope: cst.CSTNode, statement: bool) -> Iterator[cst.CSTNode]:
    kinds = (cst.BaseStatement,) if statement else (cst.BaseExpression,)
    return (node for node in _below(scope) if isinstance(node, kinds))


def _meaning(source: str) -> tuple[str, bool]:
    """What a piece of source means whatever its formatting, and whether it is a statement."""
    try:
        return ast.dump(ast.parse(f"({source}\n)", mode="eval")), False
    except SyntaxError:
        return ast.dump(ast.parse(source.strip())), True


def _meaning_of(module: cst.Module, node: cst.CSTNode, statement: bool) -> str | None:
    try:
        found, is_statement = _meaning(module.code_for_node(node))
    except SyntaxError:  # a piece that is no expression of its own, such as the ``a: b`` of a slice
        return None
    return found if is_statement == statement else None


def _new(after: str, statement: bool, fault: Fault) -> cst.CSTNode:
    try:
        return cst.parse_statement(after.strip()) if statement else cst.parse_expression(f"({after})")
    except cst.ParserSyntaxError as error:
        kind = "statement" if statement else "expression"
        raise ConfigurationError(
            f"fault {fault.id}: 'after' is no {kind}; edit it in faults/{fault.layer}.toml"
        ) from error
