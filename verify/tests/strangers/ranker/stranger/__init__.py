"""A ranker of a stranger, which keeps its scores to itself."""

__version__ = "2.0"
