"""``python -m verify selftest``: mistakes planted in a subject, or in a record, that the suite must catch.

The faults are data, a TOML file per layer under ``faults/``. Nothing here is in the instrument's digest, because one
fault more or less changes no verdict about a GPU.
"""

from verify.record.kills import caught_by
from verify.selftest.faults import LAYERS, Fault, load_faults

__all__ = ["LAYERS", "Fault", "caught_by", "load_faults"]
