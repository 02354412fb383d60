"""The published modules for transformers."""
