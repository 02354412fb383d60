"""The memory of a launch's tensors, as the simulator's buffers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from verify.simulator.memory import Buffer

if TYPE_CHECKING:
    import torch

#: Of a storage that is larger than this, only the pages with elements of its views are held, if those are few.
_LARGE_BYTES, _FEW = 1 << 28, 1 << 20
#: A multiple of the size of every element, and of the alignment of tensors.
_PAGE_BYTES = 4096


def buffers_of(
    arguments: Sequence[tuple[str, Any]], unwritten: int | None
) -> tuple[list[tuple[Buffer, np.ndarray]], list[int | float | tuple[int, int]]]:
    """The storages of the tensors among the arguments, each with its real memory, and the values to pass: numbers, or
    (number of the first buffer of the storage, offset in bytes from it).
    """
    views: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, value in arguments:
        if hasattr(value, "data_ptr"):
            tensor = _tensor(value)
            views.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    buffers: list[tuple[Buffer, np.ndarray]] = []
    first: dict[int, int] = {}
    for start, named in views.items():
        first[start] = len(buffers)
        buffers += _held(*named[0], [one for _, one in named], unwritten)
    values: list[int | float | tuple[int, int]] = []
    for _, value in arguments:
        if hasattr(value, "data_ptr"):
            start, pointer = _tensor(value).untyped_storage().data_ptr(), value.data_ptr()
            values.append((first[start], pointer - start) if pointer else 0)  # a tensor without elements has none
        else:
            values.append(value if isinstance(value, float) else int(value))
    return buffers, values


def _tensor(value: Any) -> torch.Tensor:
    """The tensor of an argument, which may be Triton's wrapper that reads one as another dtype."""
    return value if hasattr(value, "untyped_storage") else value.base


def _held(
    name: str, tensor: torch.Tensor, views: Sequence[torch.Tensor], unwritten: int | None
) -> list[tuple[Buffer, np.ndarray]]:
    """The storage of a tensor with its memory; if it is large, only its first page and those with elements of views."""
    storage = tensor.untyped_storage()
    size, address = storage.nbytes(), storage.data_ptr()
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)) if size else np.zeros(0, np.uint8)
    if size > _LARGE_BYTES and sum(one.numel() for one in views) <= _FEW:
        places = [(_places(one), one.element_size()) for one in views]
        marked = [(begin, _marks(places, begin, end)) for begin, end in _runs([one for one, _ in places], size)]
    else:
        marked = [(0, np.logical_or.reduce([_elements(one) for one in views]))]
    found: list[tuple[Buffer, np.ndarray]] = []
    for begin, elements in marked:
        part = memory[begin : begin + len(elements)]
        buffer = Buffer(
            name, part, address=address, element_bytes=tensor.element_size(), shape=tuple(tensor.shape),
            strides=tuple(tensor.stride()), offset=int(tensor.storage_offset()), unwritten=unwritten, begin=begin,
            storage_bytes=size, part_of=found[0][0] if found else None, elements=elements,
        )  # fmt: skip
        found.append((buffer, part))
    return found


def _places(tensor: torch.Tensor) -> np.ndarray:
    """Where the elements of a view begin in its storage, in bytes, ascending."""
    found = np.array([tensor.storage_offset()], np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = np.add.outer(found, np.arange(size, dtype=np.int64) * stride).ravel()
    return np.unique(found) * tensor.element_size()


def _runs(places: Sequence[np.ndarray], size: int) -> Iterator[tuple[int, int]]:
    """First byte, and the byte after the last, of every run of pages with one of these places; no element lies in two
    pages.
    """
    pages = np.unique(np.concatenate([np.zeros(1, np.int64), *(one // _PAGE_BYTES for one in places)]))
    for run in np.split(pages, np.flatnonzero(np.diff(pages) > 1) + 1):
        yield int(run[0]) * _PAGE_BYTES, min((int(run[-1]) + 1) * _PAGE_BYTES, size)


def _marks(places: Sequence[tuple[np.ndarray, int]], begin: int, end: int) -> np.ndarray:
    """Which bytes from ``begin`` to ``end`` belong to the elements at these places, which have so many bytes each."""
    marks = np.zeros(end - begin, bool)
    for starts, width in places:
        first, last = np.searchsorted(starts, (begin, end))
        for byte in range(width):
            marks[starts[first:last] - begin + byte] = True
    return marks


def _elements(tensor: torch.Tensor) -> np.ndarray:
    """Which bytes of its storage are elements of a view. NumPy marks them, since a check may watch torch's calls."""
    width, size = tensor.element_size(), tensor.untyped_storage().nbytes()
    marks = np.zeros(-(-size // width), bool)
    strides = tuple(tensor.stride())
    np.lib.stride_tricks.as_strided(marks[tensor.storage_offset() :], tuple(tensor.shape), strides)[...] = True
    return np.repeat(marks, width)[:size]
