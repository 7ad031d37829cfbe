"""The folder that a run would write to."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from data_pipeline.durable import rename, write_text
from hmoe_ds.doctor.finding import Finding, note, ok, problem

_GIB = 2**30
# What is in them is gone with the machine's memory, or with the container.
_FLEETING = ("tmpfs", "ramfs", "overlay")
_SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "wekafs", "glusterfs", "fuse.glusterfs")
_SLOW_SECONDS = 1.0


def check_folder(out: Path) -> Iterator[Finding]:
    """Try, in a folder or the nearest one above it that exists, what a run does there; what was written is removed."""
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not folder.is_dir():
        yield problem("run.out", f"{folder} is a file", "a folder", "give another one")
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".hmoe_doctor", dir=folder) as inside:
            yield check_file_system(folder, _mounts())
            yield check_locks(Path(inside))
            yield _time_writing(Path(inside))
    except OSError as error:
        yield problem("run.out", f"{folder} cannot be written to ({error.strerror})", "", "give another folder")


def _mounts() -> dict[str, str]:
    return {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}


def check_file_system(folder: Path, mounts: Mapping[str, str]) -> Finding:
    """Type and room of the file system of `folder`; `mounts`: type by where it is mounted."""
    own = folder.resolve()
    kind = next((mounts[str(path)] for path in (own, *own.parents) if str(path) in mounts), "unknown type")
    found = f"{folder}: {kind}, {shutil.disk_usage(folder).free / _GIB:.1f} GiB free"
    if kind in _FLEETING:
        return note("run.out", f"{found}; it is gone with this machine or container", "", "mount a disk there")
    return ok("run.out", found if kind in _SHARED else f"{found}; a run on several machines needs a shared one")


def check_locks(folder: Path) -> Finding:
    """Whether files in `folder` can be locked, which keeps two starts of one run apart."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            mend = "mount it with flock (Lustre: -o flock), or never start one run twice at a time"
            return note("locks", f"this file system has none ({os.strerror(error.errno)})", "", mend)
    return ok("locks", "flock works")


def _time_writing(folder: Path) -> Finding:
    started = time.perf_counter()
    write_text(folder / "made", "tried by hmoe doctor\n")
    rename(folder / "made", folder / "renamed")
    return check_speed(time.perf_counter() - started)


def check_speed(seconds: float) -> Finding:
    """What it took to bring one small file on the disk and to rename it."""
    found = f"a small file is written, flushed and renamed in {1000 * seconds:.1f} ms"
    if seconds > _SLOW_SECONDS:
        return note("flushing", found, f"less than {_SLOW_SECONDS:g} s", "a faster disk, or fewer checkpoints")
    return ok("flushing", found)
