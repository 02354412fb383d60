"""`verify compile`: builds kernels for GPUs that need not be present."""
