"""The pytest side of measuring the instrument: an error planted into each check, or a check over many seeds.

Only a scratch run, which leaves no record, uses it: the results are in the run's events, further findings in this file.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from verify.checks import derive_seed
from verify.files import write_atomic
from verify.judge.perturb import Limit, Plant, planting
from verify.record.strict import Strict
from verify.run.recorder import CURVES, id_of, spec_of

_FILE = "probed.json"


class Probed(Strict):
    """A scratch run's findings about one numeric check: the number of seeds, and the limits of its comparisons."""

    seeds: int
    limits: list[Limit]


_BY_ID = TypeAdapter(dict[str, Probed])


@dataclass(eq=False)
class Probe:
    """Plants an error of ``factor`` times what is allowed (0: none); repeats numeric checks with ``seeds`` seeds."""

    folder: Path
    factor: float
    seeds: int | None
    run_seed: int
    _plant: Plant | None = field(default=None, init=False)
    _ran: int = field(default=1, init=False)
    _found: dict[str, Probed] = field(default_factory=dict, init=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        if spec_of(item) is None:
            return (yield)
        self._plant, self._ran = Plant(self.factor, derive_seed(self.run_seed, id_of(item))), 1
        try:
            with planting(self._plant):
                return (yield)
        finally:
            if self._plant.limits:
                self._found[id_of(item)] = Probed(seeds=self._ran, limits=self._plant.limits)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        if self.seeds is None or spec_of(pyfuncitem) is None or "seed" not in pyfuncitem.funcargs:
            return None
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        for run_seed in range(self.seeds):
            self._ran = run_seed + 1
            pyfuncitem.stash[CURVES].clear()
            try:
                pyfuncitem.obj(**arguments | {"seed": derive_seed(run_seed, id_of(pyfuncitem))})
            except AssertionError as error:
                raise AssertionError(f"with --seed {run_seed}: {error}") from error
            if self._plant is not None and not self._plant.limits:
                break  # it compares no floating-point numbers
        return True

    def pytest_sessionfinish(self) -> None:
        write_atomic(self.folder / _FILE, _BY_ID.dump_json(self._found, indent=1).decode())


def read_probed(folder: Path) -> dict[str, Probed]:
    """The findings of the scratch run in ``folder`` about each numeric check, by id; empty if the run died."""
    path = folder / _FILE
    return _BY_ID.validate_json(path.read_bytes()) if path.is_file() else {}
