"""The declaration of a check: gate, claim, reason and tolerance, as data next to the test.

The catalogue (``python -m verify gates``), the must-pass lists and ``explain`` are all made from these declarations, so
they cannot drift from the checks. This module imports neither torch nor the subject.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol

Gate = Literal["hard", "soft"]

SKIP_CODES = MappingProxyType(
    {
        "NO_GPU": "the check needs an NVIDIA GPU and the run has none",
        "PKG_MISSING": "a third-party package is not installed",
        "VRAM": "the GPU has less memory than the check needs",
        "NO_BASELINE": "there is no earlier record to compare with",
    }
)

PHASES = MappingProxyType(
    {
        1: "environment",
        2: "imports",
        3: "compile",
        4: "equivalence",
        5: "trig cache",
        6: "inference",
        7: "vllm",
        8: "latency",
    }
)

#: What an implementation can offer, with the words for it. Every check is about one of these.
CAPABILITIES = MappingProxyType(
    {
        "environment": "environment",
        "api": "published names and defaults",
        "triton": "scoring with Triton",
        "pytorch": "scoring without Triton",
        "trig_table": "trig tables",
        "helpers": "helper functions",
        "ranking": "ranking",
        "compressor": "compressor",
        "statistics": "statistics files",
        "live_model": "live-model patch",
        "calibration": "calibration",
        "command_line": "command line",
        "plan": "what only the plan asks",
        "plugin": "vLLM plugin",
        "latency": "latency",
    }
)

#: What each profile must pass: the HARD checks of these capabilities. Of alternatives it must offer at least one, and
#: pass all of those that it offers.
PROFILES: Mapping[str, tuple[tuple[str, ...], ...]] = MappingProxyType(
    {
        "scorer": (("environment",), ("triton", "pytorch")),
        "engine": (
            ("environment",), ("triton", "pytorch"), ("compressor", "ranking"), ("statistics",), ("live_model",)
        ),
        "serving": (
            ("environment",), ("triton", "pytorch"), ("compressor", "ranking"), ("statistics",), ("live_model",),
            ("plugin",),
        ),
        "full": tuple((name,) for name in CAPABILITIES if name != "ranking"),
    }
)  # fmt: skip

#: The capability of a phase's checks, unless they name another.
_USUAL = {
    1: "environment",
    2: "api",
    3: "triton",
    4: "triton",
    5: "trig_table",
    6: "live_model",
    7: "plugin",
    8: "latency",
}

#: The default seed of a run: fixed, so that two runs without arguments draw the same inputs.
DEFAULT_SEED = 0

_FAMILY = re.compile(r"p[1-8]\.[a-z0-9_]+")
_CASE = re.compile(r"[A-Za-z0-9_\-]+")


@dataclass(frozen=True, slots=True)
class CheckSpec:
    """The declaration of one check, or of one family of checks that differ by ``case``.

    ``family`` is ``p<phase>.<topic>``; each key of ``cases`` makes one check with the stable id
    ``p<phase>.<topic>.<case>``. ``claim`` says what a PASS proves, ``reason`` why it matters, ``remedy`` what to do if
    it fails, ``tolerance`` which bound applies and where it comes from, ``plan`` which item of the verification plan
    (``"3.2"``) it answers. ``needs`` names checks (full ids, or families) whose failure makes this one BLOCKED.
    ``needs_gpu`` checks are SKIP(NO_GPU) on the CPU target and are not on its must-pass list. ``ahead_of_time`` checks
    are about kernels that need not run: their results are compiled evidence, which is enough. ``capability`` is what
    the check is about (``CAPABILITIES``): one for all cases, or one by case; by default that of the phase, or the path
    that a case is named after.

    Raises ValueError naming the family if a field breaks these rules.
    """

    family: str
    gate: Gate
    claim: str
    reason: str
    remedy: str
    cases: Mapping[str, Any]
    plan: str | None = None
    tolerance: str | None = None
    needs: tuple[str, ...] = ()
    needs_gpu: bool = False
    ahead_of_time: bool = False
    timeout_s: float = 120.0
    capability: str | Mapping[str, str] = ""

    def __post_init__(self) -> None:
        if not _FAMILY.fullmatch(self.family):
            raise ValueError(f"check family {self.family!r} must look like p4.triton_oracle")
        if self.gate not in ("hard", "soft"):
            raise ValueError(f"check {self.family} has gate {self.gate!r}; it must be 'hard' or 'soft'")
        if self.gate == "hard" and self.phase >= 7:
            raise ValueError(f"check {self.family} is hard, but the plan makes all of phases 7 and 8 soft")
        for name in ("claim", "reason", "remedy"):
            if not getattr(self, name).strip():
                raise ValueError(f"check {self.family} has an empty {name}; write one sentence")
        if not self.cases:
            raise ValueError(f"check {self.family} has no cases; name at least one")
        bad = [case for case in self.cases if not _CASE.fullmatch(case)]
        if bad:
            raise ValueError(f"check {self.family} has a case named {bad[0]!r}; use letters, digits, '_' and '-'")
        if unknown := [name for case in self.cases if (name := self.capability_of(case)) not in CAPABILITIES]:
            raise ValueError(f"check {self.family} is about {unknown[0]!r}; use one of {', '.join(CAPABILITIES)}")

    def capability_of(self, case: str) -> str:
        """What one of the cases is about."""
        if isinstance(self.capability, str):
            path = case.partition("-")[0]
            return self.capability or (path if path in ("triton", "pytorch") else _USUAL[self.phase])
        return self.capability[case]

    @property
    def phase(self) -> int:
        return int(self.family[1])

    def id_of(self, case: str) -> str:
        return f"{self.family}.{case}"


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the catalogue: a stable id, its declaration and the pytest node that runs it."""

    id: str
    case: str
    spec: CheckSpec
    node: str = field(compare=False)

    @property
    def phase(self) -> int:
        return self.spec.phase

    @property
    def capability(self) -> str:
        return self.spec.capability_of(self.case)

    def applies_to(self, target: str) -> bool:
        """Whether this check applies to ``target``: ``emulated`` or ``sm<NN>``."""
        return target != "emulated" or not self.spec.needs_gpu


class Measure(Protocol):
    """The type of the fixture ``measure``, which records a number and fails the check if it is outside its bound."""

    def __call__(
        self, name: str, measured: float, allowed: float, *, unit: str = "", where: str = "", cause: str = ""
    ) -> None: ...


class Draw(Protocol):
    """The type of the fixture ``curve``, which records ``(x, y)`` pairs; all curves of a check share one plot."""

    def __call__(self, name: str, points: Iterable[tuple[float, float]], *, x: str, y: str) -> None: ...


def check(family: str, *, gate: Gate, cases: Mapping[str, Any] | str, **fields: Any) -> Callable:
    """Declare the decorated test as a check, which receives the value of its case as the argument ``case``.

    ``cases`` maps case names to values; a string is the name and value of the only case.
    """
    import pytest

    named = {cases: cases} if isinstance(cases, str) else dict(cases)
    spec = CheckSpec(family=family, gate=gate, cases=MappingProxyType(named), **fields)

    def declare(test: Callable) -> Callable:
        test.check_spec = spec  # type: ignore[attr-defined]  # an attribute of the function, for catalogue()
        test = pytest.mark.parametrize("case", list(named.values()), ids=list(named))(test)
        test = getattr(pytest.mark, gate)(test)
        return pytest.mark.check(spec)(test)

    return declare


def catalogue() -> Iterator[Check]:
    """Every check of ``phases/`` by phase, then in the order of declaration.

    Imports the modules of ``phases/``, none of which imports torch at module level. Raises ValueError if two checks
    share an id, or a family's phase differs from that of its file.
    """
    import phases

    seen: dict[str, str] = {}
    names = sorted(module.name for module in pkgutil.iter_modules(phases.__path__) if re.match(r"p[1-8]_", module.name))
    for name in names:
        module = importlib.import_module(f"phases.{name}")
        for attribute, value in vars(module).items():
            spec = getattr(value, "check_spec", None)
            if spec is None:
                continue
            if spec.phase != int(name[1]):
                raise ValueError(f"check {spec.family} is in phases/{name}.py, which is for phase {name[1]}")
            for case in spec.cases:
                check_id, node = spec.id_of(case), f"phases/{name}.py::{attribute}[{case}]"
                if check_id in seen:
                    raise ValueError(f"check id {check_id} is declared twice: {seen[check_id]} and {node}")
                seen[check_id] = node
                yield Check(id=check_id, case=case, spec=spec, node=node)


def derive_seed(run_seed: int, check_id: str) -> int:
    """The 32-bit seed of one check; it depends on the run's seed and the id, not on what ran before."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{check_id}".encode()).digest()[:4], "big")
