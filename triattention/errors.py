"""Errors a user can cause."""

from __future__ import annotations


class TriAttentionError(ValueError):
    """One sentence: the thing, its value, the next step. Command lines print it without a traceback."""
