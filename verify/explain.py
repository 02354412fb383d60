"""``python -m verify gates`` and ``explain``: the catalogue of checks, and everything known about one of them."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from verify.architectures import EMULATED
from verify.checks import PHASES, PROFILES, Check, CheckSpec, catalogue
from verify.errors import ConfigurationError
from verify.files import repository_root
from verify.judge.perturb import Limit
from verify.record.archive import load, newest_first
from verify.record.grounds import BUNDLED
from verify.record.headroom import room, tightest
from verify.record.schema import CheckResult, Record
from verify.report.documents import dumps, markdown_table
from verify.report.keep_sets import kept_words, most_telling
from verify.report.matrix import PLAN_TABLE, bound, count, headroom
from verify.selftest import caught_by, load_faults
from verify.sensitivity import recorded_limits

if TYPE_CHECKING:
    from rich.console import Console

#: How many past results ``explain`` shows.
_LAST = 8

_PREFACE = """# The checks

`python -m verify gates --format markdown > docs/checks.md` makes this page from the declarations in `phases/`;
`python -m verify explain ID` shows one check in full, with its reason, remedy and last results.

* **plan**: the item of [the plan](plan.md) that the check answers.
* **must-pass**: the verdicts that need it.
* **catches**: the smallest error, planted in one element, that its least sharp case catches, in units of its bound.
"""

_NO_CHECKS = "there are no checks in phases/; run this from a checkout of the suite"


def gates(form: str = "terminal") -> int:
    """Print every family of checks with its gate, where it is must-pass, what it catches and claims; return 0."""
    families, limits = _families(list(catalogue())), recorded_limits()
    if form == "json":
        print(dumps([_family_data(spec, limits) for spec in families]), end="")
    elif form == "markdown":
        print(checks_page(), end="")
    else:
        _print_gates(families, limits)
    return 0


def checks_page() -> str:
    """``docs/checks.md``: the families of checks by phase, with their claims and bounds."""
    families, limits = _families(list(catalogue())), recorded_limits()
    header = ["check", "cases", "plan", "gate", "must-pass", "catches", "claim", "bound"]
    parts = [_PREFACE]
    for phase, name in PHASES.items():
        body = [
            [
                *(f"`{one.family}`", str(len(one.cases)), one.plan or "", one.gate.upper(), _required(one)),
                *(_catches(one, limits), one.claim, one.tolerance or ""),
            ]
            for one in families
            if one.phase == phase
        ]
        parts.append(f"## Phase {phase}: {name}\n\n{markdown_table(header, body)}")
    return "\n".join(parts)


def _required(spec: CheckSpec) -> str:
    gpu, emulated = _must(spec)
    return ", ".join(filter(None, ("GPU" if gpu != "-" else "", "emulated" if emulated != "-" else ""))) or "-"


def explain(name: str, folders: Sequence[Path] = ()) -> int:
    """Print what the check or family ``name`` claims, why, how it is judged and repeated, and its last results.

    Raises ConfigurationError naming the nearest known ids when there is no such check.
    """
    from verify.report.terminal import PipeConsole

    checks = list(catalogue())
    chosen = [check for check in checks if name in (check.id, check.spec.family)]
    if not chosen:
        raise ConfigurationError(_unknown(name, checks))
    console = PipeConsole()
    _print_claim(name, chosen, console)
    archive = load(folders)
    _print_results([check.id for check in chosen], [one for one in archive.records if not one.apart], console)
    if archive.unreadable:
        console.print(f"{count(len(archive.unreadable), 'record')} cannot be read; python -m verify report names them")
    return 0


def _families(checks: Sequence[Check]) -> list[CheckSpec]:
    if not checks:
        raise ConfigurationError(_NO_CHECKS)
    return list({check.spec.family: check.spec for check in checks}.values())


def _must(spec: CheckSpec) -> tuple[str, str]:
    """Where this family is must-pass: on which GPUs, and whether on the emulated target."""
    if not _is_must_pass(spec):
        return "-", "-"
    return "all", "-" if spec.needs_gpu else "yes"


def _is_must_pass(spec: CheckSpec) -> bool:
    """Whether a GPU must pass any check of the family to be verified."""
    wanted = {name for names in PROFILES["full"] for name in names}
    return spec.gate == "hard" and any(spec.capability_of(case) in wanted for case in spec.cases)


def _limit(ids: Iterable[str], limits: Mapping[str, Limit]) -> Limit | None:
    """The detection limit of the least sensitive of ``ids``; None if none has one."""
    return max((limits[name] for name in ids if name in limits), key=lambda limit: limit.factor, default=None)


def _catches(spec: CheckSpec, limits: Mapping[str, Limit]) -> str:
    limit = _limit(map(spec.id_of, spec.cases), limits)
    return f"{limit.factor:.3g}x" if limit else "-"


def _family_data(spec: CheckSpec, limits: Mapping[str, Limit]) -> dict[str, object]:
    ids = [spec.id_of(case) for case in spec.cases]
    return {
        "family": spec.family,
        "phase": spec.phase,
        "plan": spec.plan,
        "gate": spec.gate,
        "in_plan_table": spec.plan in PLAN_TABLE,
        "must_pass_gpu": _is_must_pass(spec),
        "must_pass_emulated": _is_must_pass(spec) and not spec.needs_gpu,
        "claim": spec.claim,
        "checks": ids,
        "detection_limits": {name: limits[name].model_dump() for name in ids if name in limits},
    }


def _print_gates(families: Sequence[CheckSpec], limits: Mapping[str, Limit]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from verify.report.terminal import PipeConsole

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("plan")
    table.add_column("check", overflow="fold")
    table.add_column("cases", justify="right")
    table.add_column("gate")
    table.add_column("GPU")
    table.add_column(EMULATED.target)
    table.add_column("catches", justify="right")
    table.add_column("claim", ratio=1)
    phase = 0
    for spec in families:
        if spec.phase != phase:
            phase = spec.phase
            table.add_section()
            table.add_row("", Text(f"{phase} {PHASES[phase]}", style="bold"))
        gate = Text(spec.gate.upper(), style="bold" if spec.gate == "hard" else "dim")
        name, cases, catches = Text(spec.family), str(len(spec.cases)), _catches(spec, limits)
        table.add_row(spec.plan or "", name, cases, gate, *_must(spec), catches, Text(spec.claim))
    console = PipeConsole()
    console.print(table)
    console.print()
    console.print("GPU and emulated: where a check is must-pass.")
    console.print("catches: the smallest planted error that every case catches, in units of its bound.")
    console.print("One check in full: python -m verify explain ID")


def _unknown(name: str, checks: Sequence[Check]) -> str:
    if not checks:
        return _NO_CHECKS
    known = list(dict.fromkeys([check.spec.family for check in checks] + [check.id for check in checks]))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"nearest are {', '.join(near)}" if near else "`python -m verify gates` lists them"
    return f"there is no check {name!r}; {hint}"


def _print_claim(name: str, chosen: Sequence[Check], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    spec = chosen[0].spec
    gpus, emulated = _must(spec)
    plan = f"{spec.plan}, in its pass/fail table" if spec.plan in PLAN_TABLE else spec.plan or "beyond the plan"
    nodes = chosen[0].node if len(chosen) == 1 else chosen[0].node.partition("[")[0]
    facts = {
        "claim": spec.claim,
        "reason": spec.reason,
        "tolerance": spec.tolerance or "none: pass or fail, no number is compared",
        "sharp to": _sharpness(_limit([check.id for check in chosen], recorded_limits())),
        "if it fails": spec.remedy,
        "source": _source(chosen[0]),
        "gate": f"{spec.gate.upper()}; must-pass on GPUs: {gpus}; emulated: {emulated}",
        "plan": plan,
        "needs": ", ".join(spec.needs) or "nothing",
        "catches": _caught(chosen),
        "cases": ", ".join(check.case for check in chosen),
        "repeat": f"python -m pytest '{nodes}'",
    }
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, fact in facts.items():
        table.add_row(Text(label, style="dim"), Text(fact))
    console.print(Text(name, style="bold"))
    console.print(table)


def _sharpness(limit: Limit | None) -> str:
    if limit is None:
        return "not measured; HARD checks that compare floating-point numbers have a detection limit"
    size = f"{limit.absolute:.3g}" + ("" if limit.value is None else f" in a result of {limit.value:.4g}")
    return f"from {limit.factor:.3g} times what is allowed: {size} (planted, in the least sensitive comparison)"


def _source(check: Check) -> str:
    """File and line of the check's test function."""
    path, name = check.node.partition("[")[0].split("::")
    test = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    return f"{path}:{inspect.getsourcelines(test)[1]}"


def _caught(chosen: Sequence[Check]) -> str:
    """The planted faults that name the checks, and how many faults they caught in each recorded selftest."""
    names = {check.id for check in chosen}
    claimed = [fault.id for fault in load_faults() if {*fault.kills} & {*names, chosen[0].spec.family}]
    recorded = caught_by(names, repository_root())
    told = [f"planted {', '.join(claimed)}" if claimed else "no planted fault names it"]
    told += [f"{len(faults)} in the last selftest of {name}" for name, faults in recorded.items()]
    return "; ".join(told)


def _print_results(ids: Sequence[str], records: Sequence[Record], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from verify.report.terminal import print_curves, verdict_text

    found: list[tuple[Record, CheckResult]] = [
        (record, result) for record in newest_first(records) for result in record.telling if result.id in set(ids)
    ]
    if not found:
        console.print("\nNo record has a result of this check.")
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    for record, result in found[:_LAST]:
        tight = tightest(result.measurements)
        number = f"{tight.name} {bound(tight)}" if tight else ""
        number += f", headroom {headroom(tight)}" if tight and room(tight) is not None else ""
        words = " ".join(filter(None, [result.verdict, result.code, result.by and f"by {result.by}"]))
        whose = str(result.waiver or "") if record.subject.source == BUNDLED else record.subject.source
        told = (Text(result.id), Text(number), Text(whose))
        table.add_row(record.time_utc[:10], record.target, result.evidence, verdict_text(words), *told)
    console.print(f"\nLast results, newest first ({min(len(found), _LAST)} of {len(found)}):")
    console.print(table)
    if last := next((result for _, result in found if result.curves), None):
        console.print()
        print_curves(last, console)
    if telling := most_telling(result for _, result in found):
        console.print(Text(f"\nKeep sets of the first round, {telling.id}: {telling.verdict}, {telling.evidence}"))
        for kept in telling.kept:
            console.print(Text(f"  {kept_words(kept)}"))
