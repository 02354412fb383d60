"""Configuration, scoring and compression of one layer."""
