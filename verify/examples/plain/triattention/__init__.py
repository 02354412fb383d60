"""TriAttention's published API once more: plain, slow, and meant to be obviously right.

It ships with the suite as a second subject, so that a check which fails here is a check to look at. It shares no code
with any other implementation. Read ``algorithm`` first, then ``vllm/core/kernels/triton_scoring`` and
``methods/triattention``.
"""

__version__ = "1.0"
