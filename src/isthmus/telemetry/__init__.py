"""Metrics and structured logs, the same names everywhere. Knows nothing of what it measures."""
