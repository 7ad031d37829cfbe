"""Names of the files in a run's folder that others read."""

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LOAD = "load.jsonl"
ALLOCATION = "allocation.jsonl"
RECORD = "run.json"
