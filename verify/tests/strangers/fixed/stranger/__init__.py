"""A scorer of a stranger: seventeen fixed offsets, the mean over them, and float64 in numpy."""

__version__ = "1.0"
