"""Makes ``pytest --pyargs phases -m hard`` in any folder a run of the installed suite; its entry point for pytest.

pytest imports this module in every project that uses an environment with the suite. So it imports nothing of the suite,
and does nothing, unless the arguments name the checks that came with it. A project may have a package ``phases`` of its
own; where pytest takes that, this does nothing either. In a checkout ``conftest.py`` does the same for every test.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Generator
from pathlib import Path

import pytest

_CHECKS = Path(__file__).resolve().parent / "phases"

#: What pytest must be able to import before the suite's own modules.
_NEEDED = ("numpy", "packaging", "pydantic", "pytest_timeout", "rich", "torch")


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None]:
    """Load the suite's plugins, with its options, if an argument is the package or the folder of the checks.

    Raises UsageError if packages are missing that the suite needs.
    """
    # `pythonpath` and a conftest of the project may put a package of the same name on the path, which pytest then takes
    yield
    known, here = early_config.known_args_namespace, early_config.invocation_params.dir
    if not any(_names_checks(argument, here, known.pyargs) for argument in known.file_or_dir):
        return
    if missing := [name for name in _NEEDED if not importlib.util.find_spec(name)]:
        raise pytest.UsageError(
            f"{', '.join(missing)} not installed here; run: pip install 'triattention-verify[verify,hf]'"
        )
    for plugin in ("verify.plugin", "verify.fixtures"):
        early_config.pluginmanager.import_plugin(plugin)


def _names_checks(argument: str, here: Path, pyargs: bool) -> bool:
    name = argument.partition("::")[0]
    if pyargs and name.partition(".")[0] == _CHECKS.name and (found := _package()):
        return found == _CHECKS
    return (here / name).resolve().is_relative_to(_CHECKS)


def _package() -> Path | None:
    """The folder of the package ``phases`` that an import finds, as pytest does; None if it finds none."""
    try:
        spec = importlib.util.find_spec(_CHECKS.name)
    except ValueError:  # something made the module by hand
        return None
    return Path(spec.origin).resolve().parent if spec and spec.origin else None
