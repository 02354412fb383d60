"""Triton's interpreter without the lookups that it repeats for every call inside a kernel."""

from __future__ import annotations

import inspect
import os
from functools import cache
from types import SimpleNamespace
from typing import Any


@cache
def quicken() -> None:
    """Cache the interpreter's constant lookups; do nothing where kernels are not interpreted.

    For each call of a jitted function, such as ``tl.sum``, the interpreter searches all members of the language for the
    builtins to replace, and for each operation it builds a table of NumPy's types: together a third of the time of
    phase 4. The interpreter itself still decides what to replace, and with what. A Triton release that does this
    differently is left unchanged.
    """
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return
    from triton.runtime import interpreter

    patch, counterpart = (getattr(interpreter, name, None) for name in ("_patch_builtin", "_get_np_dtype"))
    if patch is None or counterpart is None or "getmembers" not in patch.__code__.co_names:
        return
    is_builtin = interpreter.tl.core.is_builtin
    names: dict[Any, tuple[str, ...]] = {}

    def getmembers(package: Any, *asked: Any) -> list[tuple[str, Any]]:
        if asked:
            return inspect.getmembers(package, *asked)
        if package not in names:
            # a member that is patched at this moment is no longer a builtin, and would be missed
            names[package] = tuple(name for name, _ in inspect.getmembers(package, _was_builtin))
        return [(name, getattr(package, name)) for name in names[package]]

    def _was_builtin(member: Any) -> bool:
        original = (getattr(member, "__kwdefaults__", None) or {}).get("member")
        return is_builtin(member) or (original is not None and is_builtin(original))

    # replaces the module's own `inspect`, of which it also uses other functions
    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": getmembers})
    of_name: dict[str, Any] = {}

    def numpy_dtype(dtype: Any) -> Any:
        if dtype.name not in of_name:
            of_name[dtype.name] = counterpart(dtype)
        return of_name[dtype.name]

    interpreter._get_np_dtype = numpy_dtype
