"""The checks of the verification plan, one or more modules per phase; their helpers are in ``verify``."""
