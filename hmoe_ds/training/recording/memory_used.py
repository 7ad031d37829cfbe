"""How much memory this rank uses."""

from __future__ import annotations

import psutil
import torch


def memory_used() -> dict[str, float]:
    """Bytes: resident memory of this process now, and on a GPU the most that its tensors took so far."""
    used = {"host_memory_bytes": float(psutil.Process().memory_info().rss)}
    if torch.cuda.is_available():
        used["device_memory_bytes"] = float(torch.cuda.max_memory_allocated())
    return used
