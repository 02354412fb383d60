"""Scores of problems in which every rounding is exact, so that every right way to compute them gives the same bits.

``python -m verify.tests.simulator.exact_problems DEVICE COUNT`` prints one line of JSON for each problem: its name and
the SHA-256 of its scores. DEVICE is ``cpu`` (Triton's interpreter) or ``sim:sm<NN>``; COUNT 0 means every problem.

Keys are pairs of whole numbers whose length is whole (3, 4, 5), queries too, and the frequencies are 0, so that all
products and sums are whole numbers below 2^24.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from itertools import product

from verify.files import repository_root
from verify.machine.device import prepare
from verify.run.request import simulated_sm
from verify.subject.find import find_subject

_KERNELS = "vllm.core.kernels.triton_scoring"
_PAIRS = ((3, 4), (4, 3), (6, 8), (5, 12), (8, 15), (0, 0), (0, 7), (9, 0), (12, 5), (7, 24))
#: The queries' pairs are small, so that sums stay below 2^24.
_QUERIES = ((3, 4), (4, -3), (0, 2), (1, 0), (-5, 0), (0, 0))


@dataclass(frozen=True)
class Exact:
    dtype: str
    style: str
    aggregation: str
    d: int
    group: int
    strides: str = "contiguous"
    heads: int = 2
    batch: int = 1
    keys: int = 65

    @property
    def name(self) -> str:
        return "-".join(map(str, vars(self).values()))


def problems() -> list[Exact]:
    every = product(
        ("bfloat16", "float16", "float32"), ("half", "interleaved"), ("mean", "max"), (64, 96, 128, 256), (1, 4)
    )
    plain = [Exact(*one) for one in every]
    views = product(("half", "interleaved"), ("mean", "max"), ("transposed", "sliced", "spread"))
    strided = [Exact("bfloat16", style, how, 128, 1, strides, batch=2) for style, how, strides in views]
    sizes = [
        Exact("bfloat16", "half", how, 64, 2, keys=n, heads=3) for how in ("mean", "max") for n in (1, 31, 127, 300)
    ]
    return plain + strided + sizes


def _spread(count: int) -> list[Exact]:
    found = problems()
    return found[:: len(found) // count][:count] if count else found


def main(device: str, count: int) -> None:
    prepare("cpu", "embedded")
    if sm := simulated_sm(device):
        from verify.simulator.driver import install

        install(sm)
    import torch

    from verify.judge.problems import restride

    subject = find_subject("bundled", repository_root())
    subject.activate()
    scoring = subject.attribute(_KERNELS, "triattention_scoring")
    for number, one in enumerate(_spread(count)):
        draw = torch.Generator().manual_seed(number)

        def pairs(table: tuple[tuple[int, int], ...], *size: int) -> torch.Tensor:
            rows = torch.tensor(table, dtype=torch.float32)
            return rows[torch.randint(len(table), size, generator=draw)]  # noqa: B023  # called in this turn only

        keys = pairs(_PAIRS, one.batch, one.heads, one.keys, one.d // 2)
        keys *= torch.randint(0, 2, keys.shape, generator=draw) * 2 - 1
        rows = keys.flatten(-2) if one.style == "interleaved" else torch.cat([keys[..., 0], keys[..., 1]], -1)
        query = pairs(_QUERIES, one.heads * one.group, one.d // 2)
        length = query.norm(dim=-1).round()
        scores = scoring(
            K_rot=restride(rows.to(getattr(torch, one.dtype)), one.strides), position_indices=None,
            q_mean_real=query[..., 0].contiguous(), q_mean_imag=query[..., 1].contiguous(),
            q_abs_mean=length + torch.randint(0, 4, length.shape, generator=draw),
            freq_scale_sq=torch.ones_like(length), omega=torch.zeros(one.d // 2), offsets=torch.tensor([1.0, 2.0, 4.0]),
            round_start=64, aggregation=one.aggregation, rope_style=one.style,
        )  # fmt: skip
        assert torch.equal(scores, scores.round())
        assert scores.abs().max() < 2**24
        digest = hashlib.sha256(scores.contiguous().numpy().tobytes()).hexdigest()
        print(json.dumps({"problem": one.name, "sha256": digest}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
