"""Intercepts Triton launches. Counting them shows a check whether a kernel really ran. Recording them, instead of
running them, lets a subject's kernels be built without a GPU.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from math import prod
from typing import Any
from unittest import mock

from pydantic import ConfigDict

from verify.record.builds import Plain
from verify.record.strict import Strict

#: The Triton type that a pointer points to, by the name of the tensor's dtype.
ELEMENT_TYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "bool": "u1", "uint8": "u8",
    "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64",
    "float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5",
}  # fmt: skip


class UnknownArgument(ValueError):
    """A kernel is launched with an argument that has no Triton type here; the message names it."""


class Exchanged(Strict):
    """A message between processes; its JSON preserves infinite numbers."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Tensor(Exchanged):
    """A pointer argument: the Triton type that it points to, and whether its address is divisible by 16."""

    element: str
    aligned: bool


class Dtype(Exchanged):
    """A dtype as an argument, by its Triton name."""

    dtype: str


Value = Tensor | Dtype | Plain


class Launch(Exchanged):
    """One launch as a subject requests it, before anything is compiled.

    ``module`` and ``attribute`` say where the kernel can be looked up; ``attribute`` is empty if only a local variable
    holds it. ``arguments`` are in the order of the kernel's own signature, ``constexprs`` the names of the constants
    among them; ``options`` are num_warps, num_stages and the like.
    """

    module: str
    attribute: str
    kernel: str
    arguments: dict[str, Value]
    constexprs: tuple[str, ...] = ()
    grid: tuple[int, ...]
    options: dict[str, Plain]

    @property
    def programs(self) -> int:
        return prod(self.grid)

    @property
    def place(self) -> str:
        return f"{self.module}:{self.attribute}"

    @property
    def constants(self) -> dict[str, Plain]:
        """The constants as plain values, dtypes by name."""
        values = {name: self.arguments[name] for name in self.constexprs}
        plain = {name: value.dtype if isinstance(value, Dtype) else value for name, value in values.items()}
        return {name: value for name, value in plain.items() if not isinstance(value, Tensor)}


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the kernels launched inside the block, compiled or interpreted, in order."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    names: list[str] = []

    def counting(run: Callable[..., Any]) -> Callable[..., Any]:
        def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not kwargs.get("warmup", False):
                names.append(getattr(self.fn, "__name__", "kernel"))
            return run(self, *args, **kwargs)

        return launch

    with _replaced({JITFunction: counting, InterpretedFunction: counting}):
        yield names


@contextmanager
def skipped() -> Iterator[list[str]]:
    """The names of the kernels that would be launched inside the block; none of them runs or writes anything."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    names: list[str] = []

    def skipping(run: Callable[..., Any]) -> Callable[..., Any]:
        def launch(self: Any, *args: Any, **kwargs: Any) -> None:
            names.append(getattr(self.fn, "__name__", "kernel"))

        return launch

    with _replaced({JITFunction: skipping, InterpretedFunction: skipping}):
        yield names


@contextmanager
def recorded() -> Iterator[list[tuple[Launch, ...]]]:
    """The launches inside the block; none of them runs, so outputs stay unwritten.

    For a process in which Triton interprets its kernels, so that the tensors may be on the CPU. A kernel that is
    autotuned over several configurations is one launch with that many alternatives; any other launch has one. Raises
    UnknownArgument.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import InterpretedFunction

    launches: list[tuple[Launch, ...]] = []

    def recording(run: Callable[..., Any]) -> Callable[..., Any]:
        def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            if not warmup:
                launches.append((_described(self.fn, self.arg_names, args, kwargs, grid),))

        return launch

    def in_every_configuration(run: Callable[..., Any]) -> Callable[..., Any]:
        def launch(self: Any, *args: Any, **kwargs: Any) -> None:
            before = len(launches)
            for configuration in self.configs:
                self.fn.run(*args, **kwargs, **configuration.all_kwargs())
            if alternatives := tuple(chain(*launches[before:])):
                launches[before:] = [alternatives]

        return launch

    with _replaced({InterpretedFunction: recording, Autotuner: in_every_configuration}):
        yield launches


@contextmanager
def _replaced(wrappers: Mapping[type, Callable[[Callable[..., Any]], Callable[..., Any]]]) -> Iterator[None]:
    """Inside the block, each type's ``run`` is replaced by its wrapper around it."""
    with ExitStack() as stack:
        for owner, wrap in wrappers.items():
            stack.enter_context(mock.patch.object(owner, "run", wrap(owner.run)))
        yield


def _described(
    function: Callable[..., Any], names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any
) -> Launch:
    options = {name: value for name, value in kwargs.items() if name not in names}
    signature = inspect.signature(function)
    bound = signature.bind(*args, **{name: kwargs[name] for name in kwargs.keys() - options.keys()})
    bound.apply_defaults()
    grid = grid(bound.arguments) if callable(grid) else grid
    known = {name: _known(function.__name__, name, value) for name, value in bound.arguments.items()}
    module, attribute = _held(function)
    return Launch(
        module=module,
        attribute=attribute,
        kernel=function.__qualname__,
        arguments=known,
        constexprs=tuple(name for name, one in signature.parameters.items() if "constexpr" in str(one.annotation)),
        grid=tuple(int(size) for size in (grid if isinstance(grid, tuple | list) else (grid,))),
        options=options,
    )


def _held(function: Callable[..., Any]) -> tuple[str, str]:
    """The module and the name in it that hold a kernel's function, or an autotuner around it; no name if none does."""
    from triton.runtime.jit import KernelInterface

    def holds(value: Any) -> bool:
        kernel = isinstance(value, KernelInterface)
        while isinstance(value, KernelInterface):
            value = value.fn
        return kernel and value is function

    own = function.__module__
    found: Any = sys.modules.get(own)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    if holds(found):
        return own, function.__qualname__
    # made by a function, or bound to another name: in its own module, or in the one that had it made
    for module in (own, *sys.modules):
        for name, value in [*getattr(sys.modules.get(module), "__dict__", {}).items()]:
            if holds(value):
                return module, name
    return own, ""


def _known(kernel: str, name: str, value: Any) -> Value:
    from triton.language import constexpr, dtype

    value = value.value if isinstance(value, constexpr) else value
    if type(value) is dtype:
        return Dtype(dtype=value.name)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "data_ptr"):
        element = str(value.dtype).removeprefix("torch.")
        if element in ELEMENT_TYPES:
            return Tensor(element=ELEMENT_TYPES[element], aligned=value.data_ptr() % 16 == 0)
        value = value.dtype
    raise UnknownArgument(
        f"kernel {kernel} is launched with {name}={value!r}, which has no Triton type in verify.subject.launches; "
        f"pass a number, a string or a tensor of {', '.join(ELEMENT_TYPES)}, or add the type there"
    )
