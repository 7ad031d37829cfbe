"""One start at a time in a run's folder: two would write the same files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from data_pipeline.errors import PipelineError
from hmoe_ds.durable import make_folder

LOCK = "lock"  # of rank 0
COMMAND_LOCK = "lock.command"  # of the command that starts ranks
# Ranks of a start that was killed may be there a little longer, and locks of a dead machine on a network's file system.
WAIT_SECONDS = 150.0


@contextlib.contextmanager
def locked_run(out: Path, rank: int) -> Iterator[None]:
    """Rank 0 holds the lock of the run's folder, which is made if need be; the end of its process releases it, too.

    On a file system without locks nothing is locked.

    Raises:
        PipelineError: another start holds the lock, and goes on holding it.
    """
    if rank != 0:
        yield
        return
    make_folder(out)
    with _locked(out, LOCK, WAIT_SECONDS):
        yield


@contextlib.contextmanager
def locked_command(out: Path) -> Iterator[None]:
    """This process is the one that starts ranks in the run's folder, which is made if need be.

    Another one would take away the files by which this one and its ranks talk to each other.

    Raises:
        PipelineError: another one does.
    """
    make_folder(out)
    with _locked(out, COMMAND_LOCK, 0.0):
        yield


@contextlib.contextmanager
def _locked(out: Path, name: str, seconds: float) -> Iterator[None]:
    with (out / name).open("a+", encoding="utf-8") as file:
        _lock(file, out, seconds)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}\n")
        file.flush()
        yield


def _lock(file: TextIO, out: Path, seconds: float) -> None:
    deadline, said = time.monotonic() + seconds, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            held = f"run.out {out} is being trained by another start ({file.read().strip()})"
            if time.monotonic() > deadline:
                raise PipelineError(f"{held}: end that one, or give another run.out") from None
            if not said:
                print(f"{held}: waiting for its end, for {seconds:g} s", file=sys.stderr, flush=True)
            said = True
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            return
        else:
            return
