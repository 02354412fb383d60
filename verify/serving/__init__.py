"""Phase 7: vLLM servers, driven and judged."""
