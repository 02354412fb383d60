"""What limits the scoring kernel on each GPU, memory or instructions: predicted from its machine code, and measured."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from verify.record.builds import Build
from verify.record.schema import CheckResult, Measurement
from verify.report.matrix import count
from verify.report.site import charts
from verify.report.site.view import Column

#: The warp schedulers of a multiprocessor, each of which issues at most one instruction per clock (CUDA programming
#: guide, hardware multithreading, compute capabilities 8.0 to 12.1).
_SCHEDULERS = 4

#: Bytes per element of a key, by the word with which the name of a variant begins.
_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

#: The head dim of variants whose name has none.
_HEAD_DIM = 128

#: The variants that the cases of p8.kernel time.
_TIMED = {
    "p8.kernel.latency": "bfloat16-half-mean-d128-o17",
    "p8.kernel.cached": "bfloat16-half-mean-d128-o17-cached",
}


@dataclass(frozen=True, slots=True)
class Card:
    """A product whose peak rates are published at ``source``: multiprocessors, boost clock and memory bandwidth."""

    name: str
    target: str
    multiprocessors: int
    clock_ghz: float
    bandwidth_gbs: float
    source: str

    @property
    def ridge(self) -> float:
        """The warp instructions per byte at which issuing them takes as long as moving the bytes."""
        return _SCHEDULERS * self.multiprocessors * self.clock_ghz / self.bandwidth_gbs


#: One for each target of which all three numbers are known; without them a GPU has no roof.
CARDS = (
    Card(
        "A100 40 GB", "sm80", 108, 1.41, 1555,
        "https://upb-pc2.atlassian.net/wiki/spaces/PC2DOK/pages/1900609/NVIDIA+A100+40GB+with+NVLINK",
    ),
    Card(
        "RTX 4090", "sm89", 128, 2.52, 1008,
        "https://www.thefpsreview.com/gpu-family/nvidia-geforce-rtx-4090-gpu-family-specifications",
    ),
    Card(
        "RTX 5080", "sm120", 84, 2.62, 960,
        "https://www.notebookcheck.net/Nvidia-GeForce-RTX-5080-Benchmarks-and-Specs.935679.0.html",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cost:
    """What a build needs for each key: warp instructions and, at the least, bytes of memory traffic."""

    target: str
    name: str
    variants: Sequence[str]
    instructions: float
    bytes: int

    @property
    def ratio(self) -> float:
        """Warp instructions per byte."""
        return self.instructions / self.bytes

    @property
    def card(self) -> Card | None:
        return next((card for card in CARDS if card.target == self.target), None)

    @property
    def attainable(self) -> float | None:
        """The largest share of the memory bandwidth that issuing the instructions leaves; None without a card."""
        return min(1.0, self.card.ridge / self.ratio) if self.card else None

    @property
    def aggregation(self) -> str:
        return "max" if "-max" in self.name else "mean"


@dataclass(frozen=True, slots=True)
class Timed:
    """A case of p8.kernel that ran on a GPU, and what its variant costs there if it was also compiled."""

    target: str
    gpu: str
    result: CheckResult
    time: Measurement
    keys: Measurement
    cost: Cost | None

    @property
    def share(self) -> float | None:
        """The share of the card's memory bandwidth at which keys were read; None where its bandwidth is unknown."""
        return self.keys.measured / self.keys.allowed if math.isfinite(self.keys.allowed) else None


def bytes_per_key(variant: str) -> int | None:
    """The least memory traffic of a variant for each key and KV head: the key, read once, and the float32 score of each
    query head. None for a name that does not begin with the dtype of the keys.
    """
    dtype, *rest = variant.split("-")
    if dtype not in _ELEMENT_BYTES:
        return None
    numbers = {part[0]: int(part[1:]) for part in rest if re.fullmatch(r"[dg]\d+", part)}
    return _ELEMENT_BYTES[dtype] * numbers.get("d", _HEAD_DIM) + 4 * numbers.get("g", 1)


def roofline(columns: Sequence[Column]) -> dict[str, Any]:
    """The content of the section: what each build needs, by variant and target, and what was measured on GPUs."""
    costs = [one for column in columns for one in _costs(column)]
    found = {(one.target, one.name): one for one in costs}
    targets = list(dict.fromkeys(one.target for one in costs))
    names = {one.name: one.bytes for one in costs}
    return {
        "chart": charts.ratios(costs, CARDS) if costs else "",
        "targets": [(target, next((card for card in CARDS if card.target == target), None)) for target in targets],
        "table": [(name, size, [found.get((target, name)) for target in targets]) for name, size in names.items()],
        "cards": [card for card in CARDS if card.target in targets],
        "told": _told(costs),
        "timed": [one for column in columns for one in _timed(column, costs)],
    }


def _costs(column: Column) -> Iterable[Cost]:
    compilation = column.assessment.compilation
    for build in compilation.builds if compilation else ():
        size, instructions = _traffic(build), charts.number(build, "instructions")
        if size is not None and instructions is not None:
            yield Cost(column.name, charts.build_name(build), build.variants, instructions, size)


def _traffic(build: Build) -> int | None:
    return next((size for variant in build.variants if (size := bytes_per_key(variant)) is not None), None)


def _told(costs: Sequence[Cost]) -> str:
    """For each card, how many of its variants memory limits and how many instructions limit, in a sentence."""
    told = []
    for card in CARDS:
        if shares := [one.attainable for one in costs if one.card is card]:
            slow = sum(share is not None and share < 1 for share in shares)
            fast = count(len(shares) - slow, "variant")
            told.append(f"on the {card.name} memory limits {fast} and instructions {slow}")
    words = "; ".join(told)
    return f"{words[:1].upper()}{words[1:]}." if told else ""


def _timed(column: Column, costs: Sequence[Cost]) -> Iterable[Timed]:
    runs = {record.run_id: record for record in column.assessment.used}
    for cell in column.assessment.cells:
        result, variant = cell.result, _TIMED.get(cell.check.id)
        if result is None or variant is None or result.evidence != "hardware":
            continue
        numbers = {one.name: one for one in result.measurements}
        gpu = runs[cell.run_id].environment.gpu if cell.run_id in runs else None
        if gpu and {"time per call", "keys read per second"} <= numbers.keys():
            own = (one for one in costs if one.target == column.name and variant in one.variants)
            time, keys = numbers["time per call"], numbers["keys read per second"]
            yield Timed(column.name, gpu.name, result, time, keys, next(own, None))
