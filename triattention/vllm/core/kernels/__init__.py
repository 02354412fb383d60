"""A published module path; the implementation is in ``triattention``."""
