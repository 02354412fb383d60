"""A published path; see ``triattention`` for what is behind it."""
