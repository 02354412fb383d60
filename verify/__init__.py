"""The instrument: oracle, tolerances, gates, records and reports. ``import verify`` needs neither torch nor a GPU."""

from verify.checks import Draw, Measure, check
from verify.errors import skip

__all__ = ["Draw", "Measure", "check", "skip"]
