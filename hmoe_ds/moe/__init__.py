"""Routing and experts: scaffold gate, atom gate, executors (local and expert-parallel)."""
