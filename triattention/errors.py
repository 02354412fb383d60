"""Errors that a user can cause."""

from __future__ import annotations


class TriAttentionError(ValueError):
    """One sentence that names the thing, its value and the next step. Command lines print it without a traceback."""
