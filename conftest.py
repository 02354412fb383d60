"""Makes ``pytest`` in this repository the instrument: gates, phases, subjects and records live in ``verify.plugin``."""

from __future__ import annotations

pytest_plugins = ["verify.plugin"]
