"""Phase 6: a real model, driven and judged."""
