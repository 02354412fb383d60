"""Renders templates to pages: the content common to all pages, and the names available to a template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from verify.checks import PHASES
from verify.record.headroom import tightest
from verify.record.reading import rehearsing
from verify.record.schema import FAILING, Record
from verify.record.simulation import EVERY_SKIP_CODE
from verify.record.verdict import describe_subject, subject_option
from verify.report.keep_sets import kept_words
from verify.report.looks import LOOKS
from verify.report.matrix import bound, count, headroom
from verify.report.sentences import built, simulated, simulated_words, soft_failures
from verify.report.site.keep_sets import drawn, signs
from verify.report.site.view import known_in, page_name, title_of


@dataclass(frozen=True)
class Frame:
    """The frame of every page: the number of records, the newest one, and a sentence for each unreadable one."""

    records: int
    newest: Record | None
    unreadable: Sequence[str]

    def renderer(self, **common: Any) -> Callable[..., str]:
        """A function from a template's name, the relative path to the site's root, and the page's data to its text.

        ``common`` is available to every page.
        """
        environment = Environment(
            loader=PackageLoader("verify.report.site"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"page": page_name, "bound": bound, "headroom": headroom, "tightest": tightest}
        environment.globals |= {
            "phases": PHASES,
            "skip_codes": EVERY_SKIP_CODE,
            "looks": LOOKS,
            "failing": FAILING,
            "describe_subject": describe_subject,
            "subject_option": subject_option(self.newest.subject) if self.newest else "",
            "title_of": title_of,
            "known_in": known_in,
            "built": built,
            "simulated": simulated,
            "simulated_words": simulated_words,
            "soft_failures": soft_failures,
            "count": count,
            "kept_words": kept_words,
            "drawn": drawn,
            "keep_set_signs": signs(),
            "rehearsal": rehearsing(),
            "newest": self.newest,
            "records": self.records,
            "unreadable": self.unreadable,
            **common,
        }
        macros = environment.get_template("macros.html").module
        row_start = cache(macros.row_start)  # type: ignore[attr-defined]  # a macro, which the template defines
        environment.globals["start_of"] = lambda line, root: row_start(*line.start, root)

        def page(template: str, root: str = "", **facts: Any) -> str:
            return environment.get_template(template).render(root=root, **facts)

        return page
