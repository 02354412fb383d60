"""Makes ``pytest`` in this repository the suite: gates and records, and the fixtures of checks."""

from __future__ import annotations

import importlib.util
import sys

# before the plugins are imported, whose own error would be a traceback
if missing := [
    name for name in ("numpy", "packaging", "pydantic", "rich", "torch") if not importlib.util.find_spec(name)
]:
    print(
        f"{', '.join(missing)} not installed here; run `make setup`, then `.venv/bin/python -m pytest`", file=sys.stderr
    )
    raise SystemExit(3)

pytest_plugins = ["verify.plugin", "verify.fixtures"]
