"""One process at a time writes a result."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import UsageError


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold a lock on `path`, beside which a file lies for that time.

    Raises:
        UsageError: another process holds it.
    """
    whole = path.resolve()  # such as that of "."
    whole.parent.mkdir(parents=True, exist_ok=True)
    lock = whole.with_name(whole.name + ".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"--out {path}: another command writes it; wait for it, or give another one") from error
        try:
            yield
        finally:
            lock.unlink()
