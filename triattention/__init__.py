"""TriAttention: trigonometric KV-cache compression for long reasoning (arXiv 2604.04921), the reference
implementation.

The math is in ``rope``, ``trig``, ``scoring``, ``kernels``, ``selection`` and ``statistics``; the published paths
under ``methods`` and ``vllm`` are thin front ends over it. Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
