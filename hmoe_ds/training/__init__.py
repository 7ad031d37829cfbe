"""Distributed pretraining: engine, loop, checkpoint, metrics, tracking."""

import sys
import types

# DeepSpeed imports its autotuner, which nothing here uses, and that imports MLflow: 1.5 to 6 seconds of the start of
# every process, and 100 MB in each. Here, as this comes before the first import of DeepSpeed.
_autotuner = types.ModuleType("deepspeed.autotuning.autotuner", "Left out by hmoe_ds.")
_autotuner.Autotuner = None  # type: ignore[attr-defined]
sys.modules.setdefault(_autotuner.__name__, _autotuner)
