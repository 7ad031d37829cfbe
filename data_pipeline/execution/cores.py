"""The cores of this machine that this process may use."""

import os
import sys
from pathlib import Path


def usable_cores() -> int:
    """Cores that are left by the machine, the process's affinity (`taskset`, Slurm) and its container; at least 1."""
    return min(len(os.sched_getaffinity(0)), cpu_quota(Path("/sys/fs/cgroup")))


def cpu_quota(cgroup: Path) -> int:
    """Whole cores of which a container has the time, at least 1, by the folder of its cgroup; all without a limit."""
    file = cgroup / "cpu.max"
    quota, period = file.read_text().split() if file.exists() else ("max", "")
    return sys.maxsize if quota == "max" else max(1, int(quota) // int(period))
