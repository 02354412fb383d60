"""`verify compile`: kernels built for a GPU that need not be there."""
