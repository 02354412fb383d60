"""The variants of the scoring kernel: inputs for which a subject may build different kernels, and the scoring call.

A variant is a ``Shape``. The same variants are built ahead of time for every GPU, with 4,096 tokens, and launched in
phase 3 on a GPU or in the interpreter, with 65. A subject may build different kernels for the two numbers of tokens;
each is then built when it is met.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from verify.judge.problems import OFFSETS_17, Problem, Shape

if TYPE_CHECKING:
    import torch

    from verify.subject.subject import Subject

_DTYPES, _STYLES, _AGGREGATIONS = ("bfloat16", "float16", "float32"), ("half", "interleaved"), ("mean", "max")

#: The kernel call of plan 3.1: 8 heads, 512 tokens, five offsets.
_PLAN = Shape(n=512, h=8, t=512, offsets=OFFSETS_17[:5])


def _named(*shapes: Shape) -> dict[str, Shape]:
    return {_name(shape): shape for shape in shapes}


def _name(shape: Shape) -> str:
    parts = [shape.dtype, shape.style, shape.aggregation, f"d{shape.d}", f"o{len(shape.offsets)}"]
    return "-".join([*parts, *(["g4"] if shape.g == 4 else []), *(["cached"] if shape.cached else [])])


def _shape(
    dtype: str, style: str, aggregation: str, d: int = 128, offsets: int = 17, *, cached: bool = False, g: int = 1
) -> Shape:
    # 65 tokens: one more than the largest block of the reference, so that there is always a tail
    return Shape(
        n=65, d=d, g=g, dtype=dtype, style=style, aggregation=aggregation, offsets=OFFSETS_17[:offsets], cached=cached
    )


#: What the variants have in common unless they test it; the number of offsets is tested only where it is 1.
USUAL = Shape(n=65, offsets=OFFSETS_17[:3])

#: Every combination of key dtype, pair layout, aggregation, head dim, number of offsets and cached phases.
_EVERY = _named(
    *(
        _shape(dtype, style, aggregation, d, offsets, cached=cached)
        for dtype, style, aggregation, d, offsets, cached in product(
            _DTYPES, _STYLES, _AGGREGATIONS, (64, 128, 256), (1, 17), (False, True)
        )
    )
)

#: The variants of every run: each dtype, layout and aggregation; the usual settings; and the corner cases where kernels
#: break: the smallest and the largest head dim, the widest keys in the costliest layout, one offset.
SCORING = MappingProxyType(
    {
        f"{dtype}-{style}-{aggregation}": _shape(dtype, style, aggregation, offsets=3)
        for dtype, style, aggregation in product(_DTYPES, _STYLES, _AGGREGATIONS)
    }
    | _named(
        *(
            _shape("bfloat16", "half", aggregation, cached=cached)
            for aggregation, cached in product(_AGGREGATIONS, (False, True))
        ),
        *(_shape("bfloat16", "half", aggregation, d) for d, aggregation in product((64, 256), _AGGREGATIONS)),
        *(_shape("float32", "interleaved", aggregation, 256) for aggregation in _AGGREGATIONS),
        _shape("bfloat16", "half", "max", offsets=1),
    )
)

#: Several query heads per KV head in one call; a subject may refuse these.
GROUPED = _named(*(_shape("bfloat16", "half", aggregation, g=4) for aggregation in _AGGREGATIONS))

#: The case of p3.plan.
PLAN = MappingProxyType({"as_written": _PLAN})

#: The variants built ahead of time, by the case of the phase 3 check that launches them.
DEFAULT = MappingProxyType({**SCORING, **GROUPED, **PLAN})

#: The variants that ``--full`` builds.
FULL = MappingProxyType({**DEFAULT, **_EVERY})


def scoring_call(subject: Subject, problem: Problem, device: str) -> Callable[[], torch.Tensor]:
    """The subject's published kernel call, unguarded; a cached variant's with the subject's own trig table.

    Raises SubjectLacks if the subject lacks the call or the table, and whatever making the table raises.
    """
    module, shape = "vllm.core.kernels.triton_scoring", problem.shape
    arguments = problem.scoring_arguments()
    if shape.cached:
        arguments["trig_cache"] = table(subject, problem, device)
    return partial(subject.attribute(module, "triattention_scoring"), **arguments)


def table(subject: Subject, problem: Problem, device: str) -> Any:
    """The subject's own trig table for a problem. Raises SubjectLacks if the subject has none."""
    create = subject.attribute("vllm.core.kernels.triton_scoring", "create_trig_cache")
    return create(2 * problem.shape.t, 128, problem.offsets, problem.omega, device)


def widened(shape: Shape) -> Shape:
    """The same variant with 4,096 tokens, whole blocks of any sensible size, for counting a build's instructions."""
    return replace(shape, n=4096)
