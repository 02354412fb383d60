"""Right or wrong: the oracle, the tolerances, and the problems that subjects are given."""
