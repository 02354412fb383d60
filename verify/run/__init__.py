"""A run: its request, its processes, its log, its record."""
