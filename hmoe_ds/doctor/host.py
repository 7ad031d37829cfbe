"""What the ranks of this machine share: processors, memory, shared memory, open files."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from data_pipeline.execution.cores import usable_cores
from hmoe_ds.doctor.finding import Finding, note, ok
from hmoe_ds.training.machine import free_host_memory

_GIB = 2**30
# What a rank takes besides the model: libraries, and a batch.
_RANK_BYTES = 1.5 * _GIB
# NCCL takes some 10 MiB for each pair of GPUs; containers have 64 MiB unless told otherwise.
_SHM_BYTES = 1 * _GIB
_OPEN_FILES = 1024


def check_host(environment: Mapping[str, str]) -> Iterator[Finding]:
    """All of it, of this machine."""
    yield check_cores(os.cpu_count() or 1, usable_cores(), environment.get("OMP_NUM_THREADS"))
    yield check_memory(free_host_memory(), psutil.virtual_memory().total)
    yield check_shared_memory(Path("/dev/shm"))
    yield check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def check_cores(cores: int, usable: int, threads: str | None) -> Finding:
    """Cores of the machine and those this process may use; `threads`: OMP_NUM_THREADS, of each rank."""
    if threads is not None:
        return ok("cores", f"{usable} of {cores} usable; OMP_NUM_THREADS={threads} per rank")
    if usable < cores:
        # `hmoe pretrain` would give the ranks threads for all of them.
        mend = f"export OMP_NUM_THREADS={usable} divided by the number of ranks here"
        return note("cores", f"{usable} of {cores} usable, by the limits of this job or container", "", mend)
    return ok("cores", f"{cores}, all usable")


def check_memory(free: float, total: float) -> Finding:
    """Host memory in bytes: what processes may use now, within the limits of a job or container; all of the machine."""
    found = f"{free / _GIB:.1f} GiB free for all ranks here, of {total / _GIB:.1f} GiB in the machine"
    if free < _RANK_BYTES:
        mend = "ask the scheduler or the container for more, or end what uses it"
        return note("memory", found, f"{_RANK_BYTES / _GIB:g} GiB per rank, and the model", mend)
    return ok("memory", found)


def check_shared_memory(folder: Path) -> Finding:
    """Room in the file system of shared memory, where ranks of a machine exchange data."""
    if not folder.is_dir():
        return note("shared memory", f"there is no {folder}", "", f"mount a tmpfs on {folder}")
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / _GIB:.2g} GiB free of {usage.total / _GIB:.2g} GiB in {folder}"
    if usage.total < _SHM_BYTES:
        mend = "docker run --ipc=host or --shm-size=8g; a memory-backed emptyDir there in Kubernetes"
        return note("shared memory", found, f"{_SHM_BYTES / _GIB:g} GiB, which NCCL needs", mend)
    if usage.free < _SHM_BYTES:
        return note("shared memory", found, f"{_SHM_BYTES / _GIB:g} GiB", f"remove what killed runs left in {folder}")
    return ok("shared memory", found)


def check_open_files(soft: int, hard: int) -> Finding:
    """The limits of open files of a process."""
    if 0 <= soft < _OPEN_FILES:  # -1: none
        raised = f"ulimit -n {_OPEN_FILES}" if hard < 0 or hard >= _OPEN_FILES else "docker run --ulimit nofile=65536"
        return note("open files", f"{soft} per process", f"{_OPEN_FILES}", raised)
    return ok("open files", "no limit" if soft < 0 else f"{soft} per process")
