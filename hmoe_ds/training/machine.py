"""How much memory this machine has for the ranks that run on it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
# Files of a cgroup with its limit, and the name in its memory.stat of what cannot be given back; version 2, version 1.
_VERSIONS = (("memory.max", "anon"), ("memory.limit_in_bytes", "total_rss"))


@dataclass(frozen=True)
class Machine:
    """Memory in bytes.

    Args:
        ranks: that run on this machine.
        host: free for all of them together.
        device: of the smallest GPU that they see; None where the ranks compute on the CPU.
    """

    ranks: int
    host: float
    device: float | None = None


def ranks_here(ranks: int) -> int:
    """How many of `ranks` ranks are on this machine, as a launcher says; without one, all are."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)


def this_machine(ranks: int) -> Machine:
    """This machine, with `ranks` ranks on it."""
    return Machine(ranks, free_host_memory(), None if os.environ.get("DS_ACCELERATOR") == "cpu" else smallest_gpu())


def free_host_memory(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float:
    """Bytes that processes started here may use: what is free, within the limits of a container or a job.

    Args:
        cgroups: where the kernel shows cgroups.
        membership: file with those of this process.
    """
    limits = [limit for folder in _own_cgroups(cgroups, membership) for limit in _free_in(folder)]
    return min([float(psutil.virtual_memory().available), *limits])


def _own_cgroups(cgroups: Path, membership: Path) -> Iterator[Path]:
    """The cgroups of this process, and those around them, whose limits hold as well."""
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = cgroups / controllers
            folder = root / path.strip("/")
            yield from (folder, *(parent for parent in folder.parents if parent.is_relative_to(root)))


def _free_in(folder: Path) -> Iterator[float]:
    for limit, used in _VERSIONS:
        if (folder / limit).is_file() and (content := (folder / limit).read_text().strip()) != "max":
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield max(0.0, float(content) - float(counts.get(used, 0)))


def has_gpu() -> bool:
    """Whether this machine has a GPU; told without torch."""
    return smallest_gpu() is not None or Path("/dev/kfd").exists()  # the second of AMD


def smallest_gpu() -> float | None:
    """Bytes of the smallest CUDA device that is visible; None without one.

    The driver is asked, not torch, which would occupy memory of the device for as long as this process lives.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return None
    sizes = []
    for ordinal in range(count.value):
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        sizes.append(float(size.value))
    return min(sizes, default=None)
