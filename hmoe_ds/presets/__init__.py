"""Configurations named by size and hardware: `--config tiny_cpu`."""
