"""``vllm-check``: whether a vLLM has the names that the plugin uses, in the form recorded for its version."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from triattention.errors import TriAttentionError
from triattention.files import expanded
from triattention.vllm.runtime import hook_targets

#: Exit code if there is nothing to compare: no vLLM, or no entry for its version.
NOTHING_TO_COMPARE = 3


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "vllm-check",
        help="compare a vLLM with what the plugin expects",
        description="Compare, without importing vLLM, every vLLM name that the plugin uses with the form recorded for "
        "its version. Exit codes: 0 all match, 1 at least one differs, 3 vLLM is not installed or its version has no "
        "entry.",
        epilog=f"Entries are for {', '.join(hook_targets.supported())}; each serves all releases of its minor version.",
    )
    parser.add_argument(
        "--root", metavar="DIR", type=Path, help="folder with vllm/, e.g. an unpacked wheel (default: installed vLLM)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="instead, print the entry of this vLLM for triattention/data/vllm_hooks.json, to add support for a new "
        "version",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    root = args.root and expanded(args.root)
    try:
        if args.json:
            _print_entry(root)
            return
        report = hook_targets.check(root)
    except TriAttentionError as error:
        print(f"triattention: {error}", file=sys.stderr)
        raise SystemExit(NOTHING_TO_COMPARE) from None
    print(*_lines(report), sep="\n")
    if report.differences:
        raise TriAttentionError(hook_targets.difference_of(report, report.differences))
    print(f"vLLM {report.version}: all {len(report.targets)} targets are as recorded for {report.entry}")


def _print_entry(root: Path | None) -> None:
    found = hook_targets.read_targets(root)
    print(hook_targets.as_json({hook_targets.version_of(root).partition("+")[0]: found}), end="")
    newest = hook_targets.supported()[-1]
    absent = [name for name in hook_targets.entry(newest) if name not in found]
    if absent:
        print(f"note: absent here, and needed in {newest}: {', '.join(absent)}", file=sys.stderr)


def _lines(report: hook_targets.Report) -> list[str]:
    """The table; long parameter lists exceed their column instead of widening all rows."""
    rows = [("target", "expected", "found", "ok")]
    for target in report.targets:
        v2_only = " (V2 runner only)" if target.v2_only else ""
        rows.append((target.name + v2_only, target.expected, target.found, "yes" if target.ok else "NO"))
    width = max(len(row[0]) for row in rows)
    return [f"{name:{width}}  {ok:3}  {expected:12}  {found}" for name, expected, found, ok in rows]
