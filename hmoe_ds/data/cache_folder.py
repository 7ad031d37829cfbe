"""A bounded folder of verified files on local disk that the processes of a machine share.

    shards/CHECKSUM           complete files; the time of change is the time of the last use
    partial/CHECKSUM.RANDOM   downloads under way, of their full size from the start, locked while their process lives
    locks/                    one for the room in the folder, and some for who downloads what

The folder must be on a file system whose locks (flock) hold between all processes that use it, such as a local disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import IO

import pyarrow as pa

from data_pipeline.errors import PipelineError
from data_pipeline.manifest import FileRecord

_ROOM = "room"


class Need(IntEnum):
    """How urgently a file is needed. A download may push out only what is needed less urgently than itself."""

    NONE = 0
    UPCOMING = 1
    CURRENT = 2
    WAITED_FOR = 3


class CacheFolder:
    """Files by their records in a manifest.

    Args:
        folder: made if it is not there.
        max_bytes: bound on all files together, those being downloaded included.

    Raises:
        PipelineError: the folder cannot be used, or its disk is full; so all methods.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self._folder = Path(folder)
        self._max_bytes = max_bytes
        self._complete, self._partial, self._locks = (self._folder / name for name in ("shards", "partial", "locks"))
        with self._errors():
            for part in (self._complete, self._partial, self._locks):
                part.mkdir(parents=True, exist_ok=True)
            with self._lock(_ROOM):
                self._remove_abandoned()

    def open(self, record: FileRecord) -> pa.MemoryMappedFile | None:
        """A complete file, mapped, which counts as a use; None if it is not there, or not of the right size."""
        path = self._complete / record.blake2b
        with self._errors():
            try:
                file = pa.memory_map(str(path))
            except FileNotFoundError:
                return None
            if file.size() != record.bytes:
                file.close()
                path.unlink(missing_ok=True)
                return None
            with contextlib.suppress(FileNotFoundError):  # evicted this moment; the mapping holds
                _note_use(path)
            return file

    @contextlib.contextmanager
    def downloading(self, record: FileRecord) -> Iterator[None]:
        """Only one thread of one process downloads a file at a time; the others wait here."""
        with contextlib.ExitStack() as held:
            with self._errors():
                # Not a lock per file, as lock files cannot be removed safely: some files share one and take turns.
                held.enter_context(self._lock(record.blake2b[:2]))
            yield

    @contextlib.contextmanager
    def part(self, record: FileRecord, need: Need, needs: Mapping[str, Need]) -> Iterator[IO[bytes] | None]:
        """A file to download into, removed afterwards unless it was published; None if there is no room for it.

        Room is made by evicting what is needed less, and of that what was not used for longest.

        Args:
            record: what is to be downloaded.
            need: of this file.
            needs: of other files, by checksum; those left out are not needed.
        """
        with self._errors():
            part = self._reserve(record, need, needs)
        if part is None:
            yield None
            return
        with part:
            try:
                yield part
            finally:
                Path(part.name).unlink(missing_ok=True)

    def write(self, part: IO[bytes], block: bytes) -> None:
        """Append a block to a part."""
        rest = memoryview(block)
        with self._errors():
            while rest:  # an unbuffered file may take less than it is given
                rest = rest[part.write(rest) :]

    def publish(self, part: IO[bytes], record: FileRecord) -> pa.MemoryMappedFile:
        """Make a verified part a complete file; -> the file, mapped before anyone can evict it."""
        with self._errors():
            _note_use(part.name)
            os.fsync(part.fileno())  # or a power failure could leave the name and the size without the content
            file = pa.memory_map(part.name)
            with self._lock(_ROOM):
                os.replace(part.name, self._complete / record.blake2b)
            return file

    def _reserve(self, record: FileRecord, need: Need, needs: Mapping[str, Need]) -> IO[bytes] | None:
        with self._lock(_ROOM):
            self._remove_abandoned()
            files = [(needs.get(path.name, Need.NONE), path, stat) for path, stat in _files(self._complete)]
            held = sum(stat.st_size for _, _, stat in files) + sum(stat.st_size for _, stat in _files(self._partial))
            excess = held + record.bytes - self._max_bytes
            evictable = sorted((file for file in files if file[0] < need), key=lambda f: (f[0], f[2].st_mtime_ns))
            if excess > sum(stat.st_size for _, _, stat in evictable):
                return None
            for _, path, stat in evictable:
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= stat.st_size
            return self._new_part(record)

    def _new_part(self, record: FileRecord) -> IO[bytes]:
        with contextlib.ExitStack() as undo:
            part = tempfile.NamedTemporaryFile(  # noqa: SIM115 - the caller closes it
                prefix=f"{record.blake2b}.", dir=self._partial, buffering=0, delete=False
            )
            undo.enter_context(part)
            undo.callback(os.unlink, part.name)
            fcntl.flock(part, fcntl.LOCK_EX)
            os.posix_fallocate(part.fileno(), 0, record.bytes)  # a full disk shows before the download
            undo.pop_all()
        return part

    def _remove_abandoned(self) -> None:
        """Remove what processes that died were downloading; the caller holds the lock of the room."""
        for path, _ in _files(self._partial):
            # Blocked: its process lives. Not found: its process gave up this moment.
            with contextlib.suppress(BlockingIOError, FileNotFoundError), open(path, "rb") as part:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Held by one thread of all processes that use the folder; it goes when its process dies."""
        with open(self._locks / name, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                mend = "free space there, lower data.cache_gb, or set data.cache_dir to another disk"
                raise PipelineError(f"{self._folder}: the disk of the shard cache is full; {mend}") from error
            mend = "set data.cache_dir to a folder on a local disk that you may write to"
            raise PipelineError(
                f"{self._folder}: the shard cache cannot be used ({error.strerror or error}); {mend}"
            ) from error


def default_folder() -> Path:
    """Where shards are cached unless the user says otherwise: a home may be shared, so a machine has its own part."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "hmoe_ds" / "shards" / socket.gethostname()


def _note_use(path: str | Path) -> None:
    now = time.time_ns()  # finer than the clock of many file systems
    os.utime(path, ns=(now, now))


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """The files in a folder, without those that vanish meanwhile."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append((path, path.stat()))
    return found
