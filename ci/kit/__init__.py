"""The kit for machines without a network: ``build`` makes it, ``run`` and ``start`` are in it."""
