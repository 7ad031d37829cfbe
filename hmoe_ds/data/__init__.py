"""Prepared molecules to batches: mapped shards, the global batch plan, packed molecule batches."""
