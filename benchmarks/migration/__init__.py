"""What migration saves: `python -m benchmarks.migration`."""
