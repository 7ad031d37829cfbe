"""One start at a time in a run's folder: two would write the same files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from hmoe_ds.config import ConfigError
from hmoe_ds.durable import make_folder

LOCK = "lock"
# Ranks of a start that was killed may be there a little longer.
WAIT_SECONDS = 20.0


@contextlib.contextmanager
def locked_run(out: Path, rank: int) -> Iterator[None]:
    """Rank 0 holds the lock of the run's folder, which is made if need be; the end of its process releases it, too.

    On a file system without locks nothing is locked.

    Raises:
        ConfigError: another start holds the lock, and goes on holding it.
    """
    if rank != 0:
        yield
        return
    make_folder(out)
    with (out / LOCK).open("a") as file:
        _lock(file, out)
        yield


def _lock(file: TextIO, out: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"run.out {out} is being trained by another start: end that one, or give another run.out"
                ) from None
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            return
        else:
            return
