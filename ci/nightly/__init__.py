"""The nightly workflow's logic: ``plan``, ``job``, ``watch``, ``collect``, ``alert`` and ``waivers``, in this order.

``plan`` and ``watch`` need the standard library only, because they run before the set-up.
"""

from __future__ import annotations

#: The kinds of HARD failures: of a check that passed in the run before, and of one that did not.
NEW, OLD = "newly failing", "still failing"


class NightlyError(Exception):
    """A step cannot be carried out; the message is one sentence with the next step (exit code 3)."""
