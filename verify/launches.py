"""Triton launches: counting them, so that a check can tell a kernel that ran from a path that went round it; and
writing them down instead of running them, so that what a subject would launch can be built without a GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any
from unittest import mock

from pydantic import ConfigDict

from verify.builds import Strict

#: The Triton type of what a pointer points at, by the name of the tensor's dtype.
ELEMENT_TYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "bool": "i1", "uint8": "u8",
    "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64",
    "float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5",
}  # fmt: skip


class UnknownArgument(ValueError):
    """A kernel is launched with something that has no Triton type here; the message names it."""


class Exchanged(Strict):
    """What processes tell one another: an infinite argument comes back as the number that it was."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Tensor(Exchanged):
    """A pointer argument: the Triton type that it points at, and whether its address divides by 16."""

    element: str
    aligned: bool


class Launch(Exchanged):
    """One launch as a subject asks for it, before anything is compiled.

    ``arguments`` are in the order of the kernel's own signature, constants among them; ``options`` are num_warps,
    num_stages and the like.
    """

    module: str
    kernel: str
    arguments: dict[str, Tensor | bool | int | float | str | None]
    grid: tuple[int, ...]
    options: dict[str, bool | int | float | str | None]

    @property
    def programs(self) -> int:
        return prod(self.grid)


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
def recorded() -> Iterator[list[Launch]]:
    """The launches inside the block, none of which runs: what the kernels would write stays unwritten.

    For a process in which Triton interprets its kernels, so that the tensors may be on the CPU. A kernel that is tuned
    over several configurations is recorded with each. Raises UnknownArgument.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import InterpretedFunction

    launches: list[Launch] = []

    def recording(run: Callable[..., Any]) -> Callable[..., Any]:
        def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            if not warmup:
                launches.append(_described(self.fn, self.arg_names, args, kwargs, grid))

        return launch

    def in_every_configuration(run: Callable[..., Any]) -> Callable[..., Any]:
        def launch(self: Any, *args: Any, **kwargs: Any) -> None:
            for configuration in self.configs:
                self.fn.run(*args, **kwargs, **configuration.all_kwargs())

        return launch

    with _replaced({InterpretedFunction: recording, Autotuner: in_every_configuration}):
        yield launches


@contextmanager
def _replaced(wrappers: Mapping[type, Callable[[Callable[..., Any]], Callable[..., Any]]]) -> Iterator[None]:
    """Each type's ``run`` is what its wrapper makes of it, inside the block."""
    with ExitStack() as stack:
        for owner, wrap in wrappers.items():
            stack.enter_context(mock.patch.object(owner, "run", wrap(owner.run)))
        yield


def _described(
    function: Callable[..., Any], names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any
) -> Launch:
    options = {name: value for name, value in kwargs.items() if name not in names}
    bound = inspect.signature(function).bind(*args, **{name: kwargs[name] for name in kwargs.keys() - options.keys()})
    bound.apply_defaults()
    grid = grid(bound.arguments) if callable(grid) else grid
    known = {name: _known(function.__name__, name, value) for name, value in bound.arguments.items()}
    return Launch(
        module=function.__module__,
        kernel=function.__qualname__,
        arguments=known,
        grid=tuple(int(size) for size in (grid if isinstance(grid, tuple | list) else (grid,))),
        options=options,
    )


def _known(kernel: str, name: str, value: Any) -> Tensor | bool | int | float | str | None:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "data_ptr"):
        element = str(value.dtype).removeprefix("torch.")
        if element in ELEMENT_TYPES:
            return Tensor(element=ELEMENT_TYPES[element], aligned=value.data_ptr() % 16 == 0)
        value = value.dtype
    raise UnknownArgument(
        f"kernel {kernel} is launched with {name}={value!r}, which has no Triton type in verify.launches; "
        f"pass a number, a string or a tensor of {', '.join(ELEMENT_TYPES)}, or add the type there"
    )
