"""Phase 5: the precomputed tables of cos and sin (plan 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from verify import Measure, check
from verify.errors import Refused
from verify.judge.offers import Offers
from verify.judge.problems import Shape, make
from verify.judge.scoring import KERNEL, KERNELS, Scorer, kernel
from verify.judge.tolerance import accuracy, budget_b, trig_entry_error, worst
from verify.subject.refusal import must_refuse
from verify.subject.subject import Subject

_INTERVAL, _MAX_SEQ_LEN = 128, 8192


def _table(subject: Subject, problem):
    return subject.attribute(KERNELS, "create_trig_cache")(
        max_seq_len=_MAX_SEQ_LEN, compress_interval=_INTERVAL, offsets=problem.offsets, omega=problem.omega,
        device=problem.keys.device,
    )  # fmt: skip


def _offers(subject: Subject, device: str) -> Offers:
    """What the function that takes a table takes besides."""
    return Scorer(subject, "triton", KERNEL, device).offers


@check(
    "p5.table", gate="hard", cases={"first": 1, "middle": 32, "last": _MAX_SEQ_LEN // _INTERVAL}, plan="3.3",
    claim="Every entry of a table row is the cos or sin of (t + o) omega.",
    reason="A row that is off by one interval scores every key for another query position, and looks plausible.",
    tolerance="1.5 units of 2^-24 per entry for one rounding, plus 2 |x| units if the phase x was computed in fp32.",
    remedy="Rows are at interval, 2 interval, ...; the last one is at the largest multiple up to max_seq_len.",
)  # fmt: skip
def test_table(case: int, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    import numpy as np

    problem = make(_offers(subject, device).fit(Shape(n=8), ()), seed, device)
    t = case * _INTERVAL
    cos, sin = _table(subject, problem).get_trig_values(t)
    angle = (t + problem.case.offsets)[:, None] * problem.case.omega
    for name, got, exact in (("cos", cos, np.cos(angle)), ("sin", sin, np.sin(angle))):
        found = trig_entry_error(got.cpu().numpy(), exact, angle)
        measure(f"{name} entry: error", *found, where=f"row of t = {t}")


@check(
    "p5.cached", gate="hard", plan="3.3", needs=("p1.identity", "p1.triton", "p3.plan"),
    cases={f"{aggregation}-t{t}": (aggregation, t) for aggregation in ("mean", "max") for t in (128, 4096, 8192)},
    claim="Scores computed with the table and scores computed without it both agree with the oracle.",
    reason="The table is an optimisation; it must not change the algorithm.",
    tolerance="Class B, as without the table.",
    remedy="If p5.table passes, check which row the kernel reads.",
    timeout_s=180,
)  # fmt: skip
def test_cached(case: tuple[str, int], subject: Subject, device: str, seed: int, measure: Measure) -> None:
    aggregation, t = case
    usual = Shape(n=65)
    for attempt in _offers(subject, device).fitted(replace(usual, aggregation=aggregation, t=t), usual):
        with attempt as taken:
            problem = make(taken, seed, device)
            cached = kernel(subject, problem, trig_cache=_table(subject, problem))
            for name, call in (("uncached", kernel(subject, problem)), ("cached", cached)):
                found = accuracy(call.scores, problem.case)
                measure(f"{name}: error", *found.class_b, where=found.where)


@check(
    "p5.every_row", gate="hard", needs=("p1.identity", "p1.triton", "p3.plan"),
    # compress_interval and max_seq_len: the usual values, a last row below max_seq_len, the densest table
    cases={"interval128": (128, 8192), "interval100": (100, 6050), "interval1": (1, 64)},
    claim="At every row of a table, scores with it agree with the oracle and with scores without it.",
    reason="One wrong row spoils one round in sixty, which does not show in fluent text.",
    tolerance="Class B against the oracle; the sum of both class B budgets between the two.",
    remedy="Compare the row named in the message with its neighbours, then check how a position is mapped to its row.",
    timeout_s=180,
)  # fmt: skip
def test_every_row(case: tuple[int, int], subject: Subject, device: str, seed: int, measure: Measure) -> None:
    interval, longest = case
    base = Shape(n=9, d=64, dtype="float32", offsets=(1.0, 512.0, 65536.0))
    offers = _offers(subject, device)
    for attempt in offers.fitted(base, base):
        with attempt as taken:
            first = make(taken, seed, device)
            table = subject.attribute(KERNELS, "create_trig_cache")(
                longest, interval, first.offsets, first.omega, first.keys.device
            )
            for row, t in enumerate(range(interval, longest + 1, interval), start=1):
                aggregations = offers.taken("aggregation")
                aggregation = aggregations[row % len(aggregations)]
                problem = first.changed(shape=replace(taken, t=t, aggregation=aggregation))
                cached, uncached = kernel(subject, problem, trig_cache=table).scores, kernel(subject, problem).scores
                found = accuracy(cached, problem.case)
                measure("error", *found.class_b, where=f"t = {t}, {found.where}")
                apart = worst(cached - uncached, 2 * budget_b(problem.case))
                measure("cached minus uncached", *apart, where=f"t = {t}")


@check(
    "p5.reused", gate="hard", cases="same_table", needs=("p1.identity", "p1.triton", "p3.plan"),
    claim="One table is correct for other keys, statistics, weights and rounds, in the same tensors or in others.",
    reason="A table lives as long as the engine; anything it caches from one call is wrong in the next.",
    tolerance="Class B.",
    remedy="Store in a table only what depends on t, the offsets and omega.",
)  # fmt: skip
def test_reused_table(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    usual = Shape(n=33)
    for attempt in _offers(subject, device).fitted(usual, usual):
        with attempt as taken:
            held = make(taken, seed, device)
            table = _table(subject, held)
            for number, t in enumerate((4096, 128, 8192, 4096)):
                new = make(replace(taken, t=t), seed + number, device)
                fresh = new.tensors()
                for name, tensor in held.tensors().items():
                    tensor.copy_(fresh[name])
                for tensors in (replace(held, shape=new.shape), new):
                    found = accuracy(kernel(subject, tensors, trig_cache=table).scores, new.case)
                    measure("error", *found.class_b, where=f"call {number + 1}, t = {t}, {found.where}")


@check(
    "p5.stale", gate="soft", needs=("p1.identity", "p1.triton",),
    cases={"omega": "omega", "offsets": "offsets"},
    claim="After omega or the offsets change in place, a table made from them is refused, not used, or used for the "
    "numbers that it was made from, and never for a mixture.",
    reason="Its rows still hold the old numbers. The published API does not specify this case, so it is SOFT, and each "
    "of the three is right.",
    tolerance="Class B, or ValueError.",
    remedy="Keep a copy of the tensors a table was made from, and compare contents, not identity.",
)  # fmt: skip
def test_stale_table(
    case: str, subject: Subject, device: str, seed: int, measure: Measure, choose: Callable[[str], None]
) -> None:
    usual = Shape(n=33)
    for attempt in _offers(subject, device).fitted(usual, usual):
        with attempt as taken:
            problem = make(taken, seed, device)
            table = _table(subject, problem)
            kernel(subject, problem, trig_cache=table)  # a first call, which may check the table once and for all
            old = problem.case
            getattr(problem, case).mul_(1.5)
            new = problem.changed()
            try:
                scores = kernel(subject, problem, trig_cache=table).scores
            except Refused:
                choose("a stale table is refused")
                measure("scores given", 0, 0, where="refused")
                continue
            found, before = accuracy(scores, new.case), accuracy(scores, old)
            if found.class_b.ratio > 1.0 >= before.class_b.ratio:
                choose("a table is used for the numbers that it was made from")
                found = before
            measure("error", *found.class_b, where=found.where)


_BETWEEN = {f"t{t}": t for t in (1, 127, 129, 5000, 8191)}


@check(
    "p5.between", gate="hard", cases=_BETWEEN, needs=("p1.identity", "p1.triton",),
    claim="A round between two rows gets the oracle's scores.",
    reason="Reading the nearest row instead gives plausible scores for a different position.",
    tolerance="Class B.",
    remedy="Rotate the row below by the residual angle, or raise ValueError where such a round is refused.",
    timeout_s=180,
)  # fmt: skip
def test_between(case: int, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    shape = Shape(n=65, t=case)
    for attempt in _offers(subject, device).fitted(shape, shape):
        with attempt as taken:
            problem = make(taken, seed, device)
            try:
                found = accuracy(kernel(subject, problem, trig_cache=_table(subject, problem)).scores, problem.case)
            except Refused as error:
                raise Refused(f"t = {case}, between two rows: {error}", "rounds between rows") from error
            measure("error", *found.class_b, where=found.where)


@check(
    "p5.errors", gate="hard", plan="3.3", cases={"off_interval": 200, "before_first": 0, "beyond_last": 8320},
    claim="get_trig_values raises ValueError for a position without a row.",
    reason="Returning a neighbouring row would silently give wrong scores.",
    remedy="Raise ValueError between the rows and outside the table.",
)  # fmt: skip
def test_errors(case: int, subject: Subject, device: str, seed: int) -> None:
    table = _table(subject, make(_offers(subject, device).fit(Shape(n=8), ()), seed, device))
    what = f"get_trig_values({case}) of a table with rows at multiples of 128 from 128 to 8192 was"
    must_refuse(subject, what, lambda: table.get_trig_values(case), lambda: table.get_trig_values(_INTERVAL))


@check(
    "p5.beyond_table", gate="hard", plan="3.3", cases="scoring", needs=("p1.identity", "p1.triton",),
    claim="triattention_scoring raises ValueError for a table that does not cover the round.",
    reason="Reading past the table is an illegal access on a GPU, or gives wrong scores.",
    remedy="Compare round_start with the table's range before launching.",
)  # fmt: skip
def test_beyond_table(case: str, subject: Subject, device: str, seed: int) -> None:
    usual = Shape(n=8, t=_MAX_SEQ_LEN)
    for attempt in _offers(subject, device).fitted(usual, usual):
        with attempt as taken:
            beyond, last = (make(replace(taken, t=_MAX_SEQ_LEN + more), seed, device) for more in (_INTERVAL, 0))
            kernel(subject, last, trig_cache=_table(subject, last))
            try:
                kernel(subject, beyond, trig_cache=_table(subject, beyond))
            except Refused:
                continue
            raise AssertionError(f"a round at {beyond.shape.t} was scored with a table that ends at {_MAX_SEQ_LEN}")


@check(
    "p5.plan", gate="hard", cases="as_written", plan="3.3",
    claim="The table has a readable repr and the published attributes, and warns above the memory threshold.",
    reason="The plan's code prints it; engineers read there how much memory the tables take.",
    tolerance="1e-3 MiB around the formula's 0.156 MiB; in MB the number would be 8e-3 larger.",
    remedy="See the published attributes of TrigTableCache.",
)  # fmt: skip
def test_plan(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    import warnings

    shape = Shape(n=8, offsets=(1.0, 2.0, 4.0, 8.0, 16.0))
    problem = make(_offers(subject, device).fit(shape, ("offsets", "d")), seed, device)
    table = _table(subject, problem)
    assert "TrigTableCache" in repr(table), f"repr is {table!r}"
    sizes = (table.num_positions, table.num_offsets, table.freq_count)
    assert sizes == (64, 5, 64), f"positions, offsets and frequencies are {sizes}, expected (64, 5, 64)"
    measure("memory, off the formula by", abs(table.memory_mb - 2 * 64 * 5 * 64 * 4 / 2**20), 1e-3, unit="MiB")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        subject.attribute(KERNELS, "create_trig_cache")(
            _MAX_SEQ_LEN, _INTERVAL, problem.offsets, problem.omega, problem.keys.device, warn_threshold_mb=0.01
        )
    assert any(issubclass(w.category, UserWarning) for w in caught), "no UserWarning above warn_threshold_mb"
