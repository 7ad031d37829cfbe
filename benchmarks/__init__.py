"""Measurements behind docs/RESULTS.md: `python -m benchmarks.NAME`."""
