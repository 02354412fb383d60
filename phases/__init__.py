"""The checks of the verification plan, one module per phase; helpers and instruments live in ``verify``."""
