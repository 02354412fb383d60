"""The vLLM plugin: ``eviction`` decides in the scheduler, ``compaction`` moves keys in the worker."""
