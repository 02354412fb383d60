"""Prints builds on a terminal: one line per GPU, or every kernel of one GPU."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from verify.architectures import find
from verify.record.builds import Build, BuildVerdict, Compilation
from verify.record.schema import FAILING, Record
from verify.report.matrix import count
from verify.report.sentences import built, compiled_words
from verify.report.terminal import PipeConsole

#: Terminals at least this wide get every column.
_WIDE = 116

#: How many problems are printed before the rest is only counted.
_TOLD = 10

_STYLES = {BuildVerdict.NOT_FOUND: "yellow", BuildVerdict.TOOLCHAIN_TOO_OLD: "yellow"}


def print_compilations(compilations: Sequence[Compilation], records: Sequence[Record], folder: str) -> None:
    """Print one table, what went wrong, and where the records are."""
    console = PipeConsole()
    wide = console.width >= _WIDE
    if len(compilations) == 1 and compilations[0].builds:
        console.print(Text(f"sm{compilations[0].sm}: {compiled_words(compilations[0])}"))
        console.print()
        console.print(_kernels(compilations[0], wide=wide))
    else:
        console.print(_gpus(compilations, wide=wide))
    console.print()
    _print_problems(compilations, records, console)
    console.print("Compiled is not run: it shows that a GPU's kernels can be built, not what they do there.")
    console.print(f"records: {folder}", soft_wrap=True, markup=False)


def _gpus(compilations: Sequence[Compilation], *, wide: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("GPU", "built", "ptxas"):
        table.add_column(name, no_wrap=True)
    for name in ("registers", "stack", "instructions/key", "occupancy"):
        table.add_column(name, justify="right", no_wrap=True)
    if wide:
        table.add_column("products")
    for one in compilations:
        word = Text(built(one), style="yellow" if one.gap else "cyan" if _whole(one) else "bold red")
        found = [build.resources for build in one.builds if build.resources]
        numbers = [
            _range([used.registers for used in found]),
            _range([used.stack_bytes for used in found]),
            _range(
                [
                    used.code.warp_instructions_per_key
                    for used in found
                    if used.code and used.code.warp_instructions_per_key
                ]
            ),
            _range([100 * used.occupancy for used in found if used.occupancy is not None], "%"),
        ]
        products = [", ".join(find(one.sm).products) or "no product known"] if wide else []
        table.add_row(f"sm{one.sm}", word, one.ptxas, *numbers, *products)
    return table


def _kernels(one: Compilation, *, wide: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    several = len({build.kernel for build in one.builds}) > 1
    table.add_column("kernel and variant" if several else "variant", overflow="fold")
    needed = {id(build) for build in one.needed}
    rows = [(build, _numbers(build)) for build in one.builds]
    columns = list(_COLUMNS if wide else _NARROW)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for build, numbers in rows:
        name = Text(_named(build, several=several))
        if build.verdict is not BuildVerdict.OK:
            style = _STYLES.get(build.verdict, "bold red") if id(build) in needed else "yellow"
            name.append(f" {build.verdict}", style=style)
        table.add_row(name, *(numbers.get(column, "-") for column in columns))
    return table


#: The columns of the table of kernels, and those that fit 80 characters.
_COLUMNS = ("regs", "stack", "spill", "shared", "warps", "code", "per key", "128-bit", "MUFU", "occupancy")
_NARROW = ("regs", "stack", "per key", "128-bit", "occupancy")


def _numbers(build: Build) -> dict[str, str]:
    """The numbers of a build, by column; unknown ones are absent."""
    used = build.resources
    if used is None:
        return {}
    numbers = {
        "regs": str(used.registers),
        "stack": str(used.stack_bytes),
        "shared": str(used.shared_bytes),
        "warps": str(used.warps),
    }
    if used.occupancy is not None:
        numbers["occupancy"] = f"{used.occupancy:.0%}"
    if (code := used.code) is not None:
        numbers |= {
            "spill": str(code.spill_store_bytes + code.spill_load_bytes),
            "code": str(code.instructions),
            "128-bit": f"{code.loads.get('128', 0)}/{sum(code.loads.values())}",
            "MUFU": str(code.special_functions),
        }
        if code.warp_instructions_per_key is not None:
            numbers["per key"] = f"{code.warp_instructions_per_key:.1f}"
    return numbers


def _named(build: Build, *, several: bool) -> str:
    variants = _counted(build.variants) + build.configuration
    return f"{build.kernel}: {variants}" if several else variants


def _counted(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are: ``bfloat16-half-mean +3``."""
    return names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "")


def _range(values: Sequence[float], unit: str = "") -> str:
    if not values:
        return "-"
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def _whole(one: Compilation) -> bool:
    return not one.unlaunched and all(build.verdict is BuildVerdict.OK for build in one.needed)


def _print_problems(compilations: Sequence[Compilation], records: Sequence[Record], console: Console) -> None:
    """Print gaps, then failed builds, then failures of soft checks."""
    told = [Text(f"sm{one.sm}: {compiled_words(one)}", style="yellow") for one in compilations if one.gap]
    if told:
        told.append(
            Text("A gap is the toolchain's: it builds nothing for that GPU, so nothing is known about the subject.")
        )
    alike: dict[tuple[str, ...], list[str]] = {}
    for one in compilations:
        for build in one.needed:
            if build.verdict is not BuildVerdict.OK:
                facts = (build.verdict, build.kernel, _named(build, several=False), build.message)
                alike.setdefault(facts, []).append(f"sm{one.sm}")
    wrong = [
        Text.assemble(
            (f"{verdict} ", _STYLES.get(verdict, "bold red")), f"{kernel} on {', '.join(gpus)}, {variant}: {message}"
        )
        for (verdict, kernel, variant, message), gpus in alike.items()
    ]
    # a variant that launches nothing does so for every GPU
    problems: dict[str, dict[str, None]] = {}
    for one in compilations:
        for name, problem in one.unlaunched.items() if not one.gap else ():
            problems.setdefault(problem, {})[name] = None
    wrong += [
        Text.assemble(("NOT LAUNCHED ", "bold red"), f"{_counted(list(names))}: {problem}")
        for problem, names in problems.items()
    ]
    soft = [
        Text.assemble((f"{result.verdict} ", "bold yellow"), (result.id, "bold"), f"  {result.message}")
        for record in records
        for result in record.results
        if result.gate == "soft" and result.verdict in FAILING
    ]
    for lines, noun in ((told, "more gap"), (wrong, "more failure"), (soft, "more soft failure")):
        for line in lines[:_TOLD]:
            console.print(line)
        if len(lines) > _TOLD:
            console.print(f"and {count(len(lines) - _TOLD, noun)}; the records have all of them")
        if lines:
            console.print()
