"""Right or wrong: the oracle, the tolerances and the problems that a subject is given."""
