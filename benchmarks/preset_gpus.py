"""GPUs that each preset for GPUs is meant for, which share its batch."""

PRESET_GPUS = {"small_1gpu": 1, "base_8gpu": 8, "large_multinode": 32}
