"""Distributed pretraining: engine, loop, checkpoint, metrics, tracking."""
