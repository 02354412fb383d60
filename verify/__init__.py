"""The instrument: oracle, tolerances, gates, records and reports. ``import verify`` needs neither torch nor a GPU."""

from verify.checks import check
from verify.outcome import skip

__all__ = ["check", "skip"]
