"""Files that survive a crash of the process or of the machine: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomically(path: str | Path, aside: Path | None = None) -> Iterator[str]:
    """Gives a temporary path. What was written there gets the name `path` for good if all went well.

    A name that is there after a crash of the machine is of a whole file.

    Args:
        path: name of the file in the end.
        aside: the temporary path, on the same file system, for a file that one process at a time writes; without it, a
            name beside `path` that no other process takes, and that a kill leaves there.
    """
    temporary = aside or Path(f"{path}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        yield str(temporary)
        flush(temporary)
        rename(temporary, Path(path))
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole, or as it was. One process at a time may write it."""
    temporary = path.with_name(f"{path.name}.tmp")
    write_text(temporary, text)
    rename(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, as a whole or, as on a full disk, not at all."""
    rest = memoryview((line + "\n").encode())
    with path.open("ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(start)
            raise


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, for good; it may be there."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush(path.parent)


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot, as some that virtual machines share
            raise
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give a file or a folder, whose content is on the disk, another name for good."""
    os.replace(source, target)
    flush(target.parent)
