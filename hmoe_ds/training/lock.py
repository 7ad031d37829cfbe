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

from data_pipeline.durable import make_folder
from data_pipeline.errors import PipelineError

LOCK = "lock"  # of rank 0
COMMAND_LOCK = "lock.command"  # of the command that starts ranks
# What a file system without locks answers.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
# Ranks of a start that was killed may be there a little longer, and locks of a dead machine on a network's file system.
WAIT_SECONDS = 150.0
# `holder` has a lock for an instant.
COMMAND_WAIT_SECONDS = 1.0


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
    with _locked(out, COMMAND_LOCK, COMMAND_WAIT_SECONDS):
        yield


def holder(out: Path, name: str) -> str | None:
    """What the start says of itself that holds the lock `name` of the run's folder; None when none does.

    Nothing is written. On a file system without locks nobody holds one.
    """
    try:
        with (out / name).open(encoding="utf-8", errors="replace") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return (out / name).read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return None


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
        except BlockingIOError as error:
            file.seek(0)
            held = f"run.out {out} is being trained by another start ({file.read().strip()})"
            if time.monotonic() > deadline:
                raise PipelineError(f"{held}: end that one, or give another run.out") from error
            if not said:
                print(f"{held}: waiting for its end, for {seconds:g} s", file=sys.stderr, flush=True)
            said = True
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return
        else:
            return
