"""Shards of a dataset in object storage, kept on local disk: bounded, fetched ahead, verified.

::

    cache = ShardCache("s3://bucket/zinc", "/local/cache", max_bytes=50 << 30)
    cache.window(current, upcoming)         # starts to download; returns at once
    with cache.open(current[0]) as file:    # waits until the shard is there
        ...

A cached file is named by its checksum. So datasets share what they have in common, and a dataset that was replaced
never serves stale bytes. A file gets its name only after its size and checksum were found to be right and it was
written through to the disk; from then on its name and size are trusted, also by later runs.

All processes of a machine that name one folder share it (`cache_folder` says what that takes): they download each
shard once, and the bound is on the sum. A file may be evicted while some process has it mapped: the mapping stays
valid, and the disk space is free once it is closed.

Storage libraries keep threads, which do not survive a fork: make a ShardCache in the process that uses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa

from data_pipeline.errors import PipelineError
from data_pipeline.manifest import FileRecord
from data_pipeline.remote import join_url, open_filesystem, permanent_error, read_blocks, unreachable
from hmoe_ds.config import ConfigError
from hmoe_ds.data.cache_folder import CacheFolder, Need

_THREADS = 4
_ATTEMPTS = 5
_FIRST_PAUSE_S = 1.0  # doubled after each attempt, on top of the storage library's own retries


class ShardCache:
    """The shards of one dataset, by their records in its manifest.

    Args:
        url: dataset, in any form that fsspec opens: `s3://bucket/prefix`, `gs://...`, `file:///...`.
        folder: of the cache, on local disk; made if it is not there.
        max_bytes: bound on the files in the folder, those being downloaded included.
        together: caches of this process that share the folder; this one joins them. None of them evicts what another
            one needs.

    Raises:
        UsageError: a protocol that is unknown, or whose package is not installed.
        PipelineError: a folder that cannot be used.
    """

    def __init__(self, url: str, folder: str | Path, max_bytes: int, together: list[ShardCache] | None = None) -> None:
        self._url = url
        self._filesystem, root = open_filesystem(url)
        self._root = root.rstrip("/")
        self._max_bytes = max_bytes
        self._folder = CacheFolder(folder, max_bytes)
        self._needs: dict[str, Need] = {}  # replaced as a whole, never changed: download threads read it
        self._current_bytes = 0
        self._mutex = threading.Lock()  # guards the two below
        self._queue: deque[FileRecord] = deque()
        self._threads = 0
        self._together = [] if together is None else together
        self._together.append(self)

    def window(self, current: Sequence[FileRecord], upcoming: Sequence[FileRecord] = ()) -> None:
        """Say which shards are needed now and which come after them; starts to download them in this order.

        It returns at once, and replaces what the last call said: what was queued then and not begun is forgotten,
        and what is in neither list may be evicted. `upcoming` is fetched as far as it fits beside `current`. What
        fails in the background is left to `open`, which tries again and tells.

        Raises:
            ConfigError: `current` is larger than the whole cache.
        """
        self._current_bytes = 0
        self._check_bound(current)
        self._current_bytes = sum(record.bytes for record in current)
        with self._mutex:
            needs = {record.blake2b: Need.UPCOMING for record in upcoming}
            self._needs = needs | {record.blake2b: Need.CURRENT for record in current}
            self._queue = deque((*current, *upcoming))
            while self._threads < min(_THREADS, len(self._queue)):
                threading.Thread(target=self._download_queued, name="shard-download", daemon=True).start()
                self._threads += 1

    def open(self, record: FileRecord) -> pa.MemoryMappedFile:
        """The shard, mapped; downloads it, or waits for a download under way, where it is not in the cache.

        Raises:
            ConfigError: it is larger than the whole cache.
            PipelineError: it is missing, not readable, or not what the manifest says; or the cache cannot be used.
        """
        self._check_bound([] if self._needs.get(record.blake2b) == Need.CURRENT else [record])
        while (file := self._get(record, Need.WAITED_FOR, _ATTEMPTS)) is None:
            time.sleep(0.05)  # other downloads hold what room there is; they end
        return file

    def check(self, records: Sequence[FileRecord]) -> None:
        """Raise PipelineError when a shard is missing in the storage or has another size than it was written with."""
        try:
            listing = self._filesystem.find(self._root, detail=True)
            self._filesystem.invalidate_cache()  # or later reads would take sizes from the listing
        except Exception as error:  # storage libraries share no base class
            raise permanent_error(self._url, error) or unreachable(self._url, error) from error
        for record in records:
            info = listing.get(self._path(record))
            if info is None:
                raise PipelineError(f"{self._object(record)}: no such object; upload the dataset again")
            if info["size"] not in (None, record.bytes):  # some storage lists no sizes
                raise self._wrong_size(record, f"{info['size']:,}")

    def _download_queued(self) -> None:
        try:
            while (item := self._next_queued()) is not None:
                with contextlib.suppress(PipelineError):  # open() tries again, and tells
                    file = self._get(*item, attempts=1)
                    if file is not None:
                        file.close()
        except BaseException:
            with self._mutex:
                self._threads -= 1
            raise

    def _next_queued(self) -> tuple[FileRecord, Need] | None:
        """The next download, or None as the sign for the calling thread to end."""
        with self._mutex:
            if self._queue:
                record = self._queue.popleft()
                return record, self._needs[record.blake2b]
            self._threads -= 1
            return None

    def _get(self, record: FileRecord, need: Need, attempts: int) -> pa.MemoryMappedFile | None:
        """The shard, mapped, from the folder or downloaded into it; None when there is no room for it."""
        file = self._folder.open(record)
        if file is not None:
            return file
        with self._folder.downloading(record):
            file = self._folder.open(record)  # another process may have been faster
            if file is not None:
                return file
            with self._folder.part(record, need, self._needs_of_all()) as part:
                if part is None:
                    return None
                self._fill(part, record, attempts)
                return self._folder.publish(part, record)

    def _needs_of_all(self) -> dict[str, Need]:
        needs: dict[str, Need] = {}
        for cache in self._together:
            for checksum, need in cache._needs.items():
                needs[checksum] = max(need, needs.get(checksum, Need.NONE))
        return needs

    def _fill(self, part: IO[bytes], record: FileRecord, attempts: int) -> None:
        """Download and verify. A mismatch may be an accident of the transfer, so it gets a second chance."""
        problem = self._fetch(part, record, attempts) and self._fetch(part, record, attempts)
        if problem is not None:
            raise problem

    def _fetch(self, part: IO[bytes], record: FileRecord, attempts: int) -> PipelineError | None:
        """Download, again after errors that may pass; -> how the content differs from the record."""
        attempt = 1
        while True:
            try:
                return self._copy(part, record)
            except PipelineError:
                raise
            except Exception as error:  # storage libraries share no base class
                permanent = permanent_error(self._object(record), error)
                if permanent is not None:
                    raise permanent from error
                if attempt == attempts:
                    raise unreachable(self._object(record), error) from error
            time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            attempt += 1

    def _copy(self, part: IO[bytes], record: FileRecord) -> PipelineError | None:
        # The digest is that of data_pipeline.keys.file_checksum, taken here while the bytes pass.
        digest, size = hashlib.blake2b(digest_size=16), 0
        part.seek(0)
        for block in read_blocks(self._filesystem, self._path(record)):
            size += len(block)
            if size > record.bytes:
                return self._wrong_size(record, f"more than {record.bytes:,}")
            digest.update(block)
            self._folder.write(part, block)
        if size < record.bytes:
            return self._wrong_size(record, f"{size:,}")
        if digest.hexdigest() != record.blake2b:
            return PipelineError(
                f"{self._object(record)}: the content is not what was prepared (checksum differs); "
                "upload the dataset again"
            )
        return None

    def _check_bound(self, records: Sequence[FileRecord]) -> None:
        needed = sum(record.bytes for record in records) + sum(cache._current_bytes for cache in self._together)
        if needed > self._max_bytes:
            raise ConfigError(
                f"data.cache_gb bounds the shard cache to {self._max_bytes:,} bytes, but the shards that are needed at "
                f"once have {needed:,} bytes: raise data.cache_gb, or in a new run lower data.window_shards"
            )

    def _wrong_size(self, record: FileRecord, found: str) -> PipelineError:
        return PipelineError(
            f"{self._object(record)}: has {found} bytes, expected {record.bytes:,}; upload the dataset again"
        )

    def _path(self, record: FileRecord) -> str:
        return f"{self._root}/{record.file}"

    def _object(self, record: FileRecord) -> str:
        return join_url(self._url, record.file)
