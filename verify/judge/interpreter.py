"""Triton's interpreter without what it looks up anew for every call inside a kernel."""

from __future__ import annotations

import inspect
import os
from functools import cache
from types import SimpleNamespace
from typing import Any


@cache
def quicken() -> None:
    """Have the interpreter look up only once what never changes; nothing where kernels are not interpreted.

    Each call of a jitted function, every ``tl.sum`` of a program among them, makes it go through all members of the
    language for the builtins that it has to replace, and each operation makes a table of NumPy's types: together a
    third of the time of phase 4. What is replaced, and by what, stays the interpreter's own affair. A Triton that does
    this in another way is left as it is.
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
            # what is patched at this moment is no builtin any more, and would be missed
            names[package] = tuple(name for name, _ in inspect.getmembers(package, _was_builtin))
        return [(name, getattr(package, name)) for name in names[package]]

    def _was_builtin(member: Any) -> bool:
        original = (getattr(member, "__kwdefaults__", None) or {}).get("member")
        return is_builtin(member) or (original is not None and is_builtin(original))

    # the module's own name for inspect, of which it uses more than this
    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": getmembers})
    of_name: dict[str, Any] = {}

    def numpy_dtype(dtype: Any) -> Any:
        if dtype.name not in of_name:
            of_name[dtype.name] = counterpart(dtype)
        return of_name[dtype.name]

    interpreter._get_np_dtype = numpy_dtype
