"""Molecule files -> a dataset directory of Arrow shards. Knows RDKit and Arrow, and no model."""
