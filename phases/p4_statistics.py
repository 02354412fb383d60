"""Phase 4, statistics files in the published layout, written and read by ``methods.pruning_utils``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from verify import Measure, check
from verify.judge.compressor import HEAD_ABSENT
from verify.judge.problems import Problem, Shape, make
from verify.subject.refusal import REFUSALS, refusable, refusal
from verify.subject.subject import Subject

_UTILITIES = "methods.pruning_utils"


@check(
    "p4.statistics_file", gate="hard", capability="statistics", cases="round_trip",
    claim="load_head_frequency_stats returns bitwise what save_head_frequency_stats wrote, for every head.",
    reason="If heads are read in another order, each is silently scored with another head's statistics.",
    tolerance="Exact: float32 in, float32 out.",
    remedy="Look up a head by its layer and number, not by its place in the file.",
)  # fmt: skip
def test_statistics_file(case: str, subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure) -> None:
    import torch

    save = subject.attribute(_UTILITIES, "save_head_frequency_stats")
    load = subject.attribute(_UTILITIES, "load_head_frequency_stats")
    problem = make(Shape(n=1, h=33), seed, device)  # two-digit heads: sorting by name differs from sorting by number
    heads = [(number % 11, number // 11) for number in range(33)]
    means = torch.complex(problem.q_mean_real, problem.q_mean_imag)
    given = {
        head: SimpleNamespace(q_mean_complex=means[row], q_abs_mean=problem.q_abs_mean[row])
        for row, head in enumerate(heads)
    }
    save(tmp_path / "statistics.pt", heads, given, {"head_dim": 128, "note": "kept"})
    metadata, found = load(tmp_path / "statistics.pt", device)
    assert metadata.get("note") == "kept", f"the metadata has {sorted(metadata)}, not the entries that were saved"
    assert set(found) == set(given), f"{len(found)} of {len(given)} heads were read"
    wrong = [head for row, head in enumerate(heads) if not _has(found[head], problem, row)]
    measure("heads read with other numbers", len(wrong), 0, where=f"(layer, head) {wrong[0]}" if wrong else "")


@check(
    "p4.statistics_layout", gate="hard", capability="statistics", cases={"two_digits": "02d", "unpadded": "d"},
    claim="load_head_frequency_stats reads a file in the published layout with more than ten heads in a layer, in any "
    "order. If its entries are named without leading zeros, it reads them too or raises ValueError.",
    reason="A head that is dropped in silence, or read as another, is missing or wrong in every later score.",
    tolerance="Exact: float32 in, float32 out.",
    remedy="Look up each of sampled_heads by its name, layer00_head10, and raise for one that the file lacks.",
)  # fmt: skip
def test_statistics_layout(
    case: str, subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure, choose: Callable[[str], None]
) -> None:
    import torch

    load = subject.attribute(_UTILITIES, "load_head_frequency_stats")
    layers, heads = 3, 12
    problem = make(Shape(n=1, h=layers * heads), seed, device)
    rows = {(number // heads, number % heads): number for number in range(layers * heads)}

    def read(width: str) -> dict[tuple[int, int], Any]:
        parts = {name: getattr(problem, name).cpu() for name in ("q_mean_real", "q_mean_imag", "q_abs_mean")}
        stats = {
            f"layer{layer:{width}}_head{head:{width}}": {name: part[row].clone() for name, part in parts.items()}
            for (layer, head), row in sorted(rows.items(), reverse=True)
        }
        metadata = {"sampled_heads": [list(head) for head in rows], "head_dim": 128, "rope_style": "half"}
        torch.save({"metadata": metadata, "stats": stats}, tmp_path / "statistics.pt")
        return load(tmp_path / "statistics.pt", device)[1]

    done = "read"
    with refusable(subject, "a statistics file in the published layout", lambda: _own_file(subject, problem, tmp_path)):
        found = read("02d")
    if case != "02d":
        try:
            found = read(case)
        except REFUSALS as error:
            if not refusal(error, subject):
                raise
            done = "refused"
    dropped = [head for head in rows if head not in found]
    where = f"(layer, head) {dropped[0]}" if dropped else ""
    measure("heads of the file that were dropped without an error", len(dropped), 0, where=where, cause=HEAD_ABSENT)
    wrong = [head for head, row in rows.items() if not _has(found[head], problem, row)]
    measure("heads read with other numbers", len(wrong), 0, where=f"(layer, head) {wrong[0]}" if wrong else "")
    if case != "02d":
        choose(f"entries named without leading zeros are {done}")


def _own_file(subject: Subject, problem: Problem, folder: Path) -> None:
    """Write the statistics of one head to a file as the subject does, and read it."""
    import torch

    head = SimpleNamespace(
        q_mean_complex=torch.complex(problem.q_mean_real[0], problem.q_mean_imag[0]), q_abs_mean=problem.q_abs_mean[0]
    )
    path = folder / "own.pt"
    subject.attribute(_UTILITIES, "save_head_frequency_stats")(path, [(0, 0)], {(0, 0): head}, {"head_dim": 128})
    subject.attribute(_UTILITIES, "load_head_frequency_stats")(path, "cpu")


def _has(one: Any, problem: Problem, row: int) -> bool:
    """Whether statistics of a head are bitwise those of a row of the problem."""
    import torch

    mean = torch.complex(problem.q_mean_real[row], problem.q_mean_imag[row])
    return torch.equal(one.q_mean_complex, mean) and torch.equal(one.q_abs_mean, problem.q_abs_mean[row])
