"""Keep sets as pictures: a column for each token, the subject's keep set above the oracle's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from markupsafe import Markup

from verify.record.pictures import KeptSet

#: A longer keep set has no picture. Those of the suite's own checks are far shorter.
LONGEST = 1024

#: How many tokens are in one block; a line of a picture has as many blocks as fit.
_BLOCK = 16

#: In pixels: the width of a column, the side of a cell, and the heights of the marks, of the rows and of a block.
_COLUMN, _CELL = 8, 7
_MARK, _ROWS, _HEIGHT = 13, (18.5, 28.5), 33

#: The cells of a row by what the keep set and the other one do with the token.
_KINDS = {(True, True): "kept", (False, False): "out", (True, False): "kept swapped", (False, True): "out swapped"}


def drawn(one: KeptSet) -> Markup:
    """The keep set in blocks, each of which is an SVG; empty if it is too long.

    A kept token is a full square and an evicted one a hollow square. A token that only one of the two keeps is crossed
    out, and a protected one has a bar above it.
    """
    if one.tokens > LONGEST:
        return Markup()
    rows = one.of("kept"), one.of("oracle"), one.of("protected")
    blocks = (_block(start, *(row[start : start + _BLOCK] for row in rows)) for start in range(0, one.tokens, _BLOCK))
    return Markup("").join(blocks)


def signs() -> list[tuple[Markup, str]]:
    """A picture of each kind of cell and of the bar, with its meaning."""
    meanings = {"kept": "kept", "out": "evicted", "kept swapped": "kept in this row only"}
    meanings |= {"out swapped": "evicted in this row only", "bar": "protected"}
    size = f'width="{_COLUMN}" height="{_COLUMN + 2}"'
    return [(Markup(f"<svg {size}>{''.join(_paths(kind, [0], 5))}</svg>"), words) for kind, words in meanings.items()]


def _block(start: int, kept: list[bool], oracle: list[bool], protected: list[bool]) -> Markup:
    """The tokens from position ``start`` on; no text in it is from a record."""
    size = f'width="{_COLUMN * _BLOCK}" height="{_HEIGHT}"'
    parts = [f'<svg {size}><text y="9">{start}</text>']
    parts += _paths("bar", [at for at, bit in enumerate(protected) if bit], _MARK)
    for height, own, other in ((_ROWS[0], kept, oracle), (_ROWS[1], oracle, kept)):
        for pair, kind in _KINDS.items():
            cells = [at for at, found in enumerate(zip(own, other, strict=True)) if found == pair]
            parts += _paths(kind, cells, height)
    return Markup("".join(parts) + "</svg>")


def _paths(kind: str, cells: list[int], height: float) -> Iterator[str]:
    """The cells of one kind in a row, run by run: a style makes a square of each column of a line."""
    if not cells:
        return
    lines = "".join(f"M{_COLUMN * first} {height:g}h{_COLUMN * length - 1}" for first, length in _runs(cells))
    yield f'<path class="{kind}" d="{lines}"/>'
    if kind.startswith("out"):
        yield f'<path class="in" transform="translate(1)" d="{lines}"/>'
    if kind.endswith("swapped"):
        crosses = "".join(f"M{_COLUMN * at + 1.5} {height - 2:g}l4 4m0-4l-4 4" for at in cells)
        yield f'<path class="cross" d="{crosses}"/>'


def _runs(cells: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The first cell and the length of each run of neighbours."""
    for _, run in groupby(enumerate(cells), lambda pair: pair[1] - pair[0]):
        members = [cell for _, cell in run]
        yield members[0], len(members)
