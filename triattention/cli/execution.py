"""Running the unfinished batches of plans, in this process or in child processes, with progress and a summary."""

from __future__ import annotations

import sys
import tempfile
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from triattention.cli.children import Job, run_jobs, slots_on, visible_gpus
from triattention.cli.plan import Plan, describe
from triattention.cli.results import Line, Results, summary_path, write_summary
from triattention.cli.summary import COLUMNS, settings_of, summarise, summary_line, table
from triattention.errors import TriAttentionError

_SHOWN_CHARACTERS = 400


def run_many(plans: Sequence[Plan], *, dry_run: bool) -> None:
    """Run every plan, each in its own processes, then print a table; a failed plan does not stop the others.

    Raises TriAttentionError at the end if any failed.
    """
    if dry_run:
        dry(plans)
        return
    for plan in plans:
        Results(plan, plan.path).done()  # detect files of other runs before hours are spent on the first plan
    rows, failed = [["run", *COLUMNS]], []
    for number, plan in enumerate(plans, start=1):
        print(f"run {number} of {len(plans)}: {plan.name}")
        try:
            summary = execute(plan, isolate=True)
        except TriAttentionError as error:
            print(f"note: {plan.name} failed: {error}", file=sys.stderr)
            failed.append(plan.name)
            rows.append([plan.name, "failed", *[""] * (len(COLUMNS) - 1)])
        else:
            rows.append([plan.name, *(cell(summary) for cell in COLUMNS.values())])
    print(table(rows))
    if failed:
        raise TriAttentionError(
            f"{len(failed)} of {len(plans)} runs failed ({', '.join(failed)}); fix the cause and run the same "
            "command again: finished batches are kept"
        )


def dry(plans: Sequence[Plan]) -> None:
    """Print what the plans would run. Raises, as the runs would, for a results file with other settings."""
    done = [0 if plan.path is None else len(Results(plan, plan.path).done()) for plan in plans]
    print(*describe(plans, done, len(_worker_slots(plans[0]))), sep="\n")


def execute(plan: Plan, *, isolate: bool = False) -> dict[str, Any]:
    """Answer the unfinished batches of ``plan``, print the replies and the summary, and return the summary.

    ``isolate`` runs even a single worker in a child process, so that its memory is measured and freed separately.
    """
    with ExitStack() as stack:
        path = plan.path or Path(stack.enter_context(tempfile.TemporaryDirectory())) / f"{plan.name}.jsonl"
        results = Results(plan, path)
        stack.enter_context(results.open())
        done = results.done()
        pending = [batch for batch in range(len(plan.batches)) if batch not in done]
        total = len(plan.questions) * plan.args.num_samples
        reporter = stack.enter_context(_Reporter(total, sum(len(plan.batches[batch]) for batch in done)))
        if done:
            reporter.say(f"note: {len(done)} of {len(plan.batches)} batches are in {path} already")
        if pending:
            summary_path(path).unlink(missing_ok=True)  # a summary of lines that were removed since
            try:
                _answer(plan, pending, results, reporter, isolate)
            except KeyboardInterrupt:
                if plan.path is not None and path.exists():
                    reporter.say(f"note: finished batches are in {path}; run the same command to resume")
                raise
        lines = results.finish()
        summary = summarise(lines)
        if plan.path is not None:
            write_summary(path, {**settings_of(lines), **summary})
    print(summary_line(summary), flush=True)
    return summary


def _answer(plan: Plan, pending: Sequence[int], results: Results, reporter: _Reporter, isolate: bool) -> None:
    from triattention.cli.answering import answer_batches

    slots = _worker_slots(plan)[: len(pending)]
    if len(slots) == 1 and not isolate:
        from triattention.evaluation import grading  # noqa: F401 - a missing math-verify must show before the model is loaded

        answer_batches(plan, pending, results, reporter.show)
        return
    options = {name: value for name, value in vars(plan.args).items() if name != "run"}
    jobs = [
        Job(
            f"worker {n + 1} of {len(slots)}",
            "triattention.cli.answering:answer_in_child",
            {"args": options, "path": str(results.path), "batches": pending[n :: len(slots)]},
        )
        for n in range(len(slots))
    ]
    failures = run_jobs(jobs, slots, tick=lambda: reporter.show(results.new_lines()), note=reporter.say_on_stderr)
    if failures:
        what_now = "" if plan.path is None else f" (finished batches are in {results.path}; the same command resumes)"
        raise TriAttentionError("; ".join(failures) + what_now)


def _worker_slots(plan: Plan) -> list[dict[str, str]]:
    """Environment variables for each worker: on a GPU machine the one GPU that it sees; workers may share one."""
    gpus = visible_gpus(plan.settings["device"])
    return slots_on(gpus, plan.args.workers or max(len(gpus), 1))


class _Reporter:
    """Prints replies as they arrive, with a progress bar if stderr is a terminal."""

    def __init__(self, total: int, done: int) -> None:
        from tqdm import tqdm

        self._total, self._count = total, done
        self._bar = tqdm(total=total, initial=done, unit="reply", file=sys.stderr, disable=not sys.stderr.isatty())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def say_on_stderr(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)

    def show(self, lines: Sequence[Line]) -> None:
        for line in lines:
            self._count += 1
            verdict = "correct" if line["correct"] else "wrong"
            question, reply = (
                textwrap.shorten(line[name], _SHOWN_CHARACTERS, placeholder=" ...") for name in ("question", "answer")
            )
            sample = f" (sample {line['sample'] + 1} of {line['num_samples']})" if line["num_samples"] > 1 else ""
            truncated = ", truncated" if line["truncated"] else ""
            self.say(
                f"[{self._count}/{self._total}] {verdict}: {question}{sample}\n"
                f"    answer: {reply}\n"
                f"    expected {line['expected']}, got {line['extracted'] or 'nothing'}; {line['new_tokens']} tokens"
                f"{truncated}, {line['tokens_per_s']:.1f} tokens/s, peak KV {line['peak_kv_tokens']}, "
                f"rounds {line['rounds']}"
            )
        self._bar.update(len(lines))
