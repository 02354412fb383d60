"""Makes ``pytest`` in this repository the suite: gates and records, and the fixtures of checks."""

from __future__ import annotations

pytest_plugins = ["verify.plugin", "verify.fixtures"]
