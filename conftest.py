"""Makes ``pytest`` in this repository the instrument: gates, phases, subjects and records live in ``verify.plugin``."""

pytest_plugins = ["verify.plugin"]
