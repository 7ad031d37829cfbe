"""Checkpoints: saving and restoring a run, which are kept, other topologies, a copy elsewhere."""
