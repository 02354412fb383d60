"""The vLLM plugin: ``eviction`` plans rounds in the scheduler, ``compaction`` moves keys and values in the worker."""
