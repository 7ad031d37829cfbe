"""The bytes of a source: a local path or a URL that fsspec opens, decompressed, with errors that name the file."""

import glob
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.keys import file_checksum
from data_pipeline.redact import without_credentials
from data_pipeline.remote import (
    is_url,
    one_line,
    open_filesystem,
    permanent_error,
    read_checksum,
    read_size,
    unreachable,
)

# By the name of the codec in Arrow, which notices a truncated file in all three; zstandard's own reader does not.
COMPRESSION_EXTENSIONS = {".gz": "gzip", ".bgz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2"}

# Of one request to a remote file: large beside its latency, small beside memory.
REQUEST_BYTES = 8 << 20


def file_name(path: str) -> str:
    """The last part of a path or URL, without the query that a URL may have."""
    return os.path.basename(without_credentials(path))


def has_wildcard(path: str) -> bool:
    """True if a path or URL is a pattern. In an http URL a question mark begins the query."""
    return glob.has_magic(path.replace("?", "") if _is_http(path) else path)


def split_compression(name: str) -> tuple[str, str | None]:
    """A file name in lower case without the extension of its compression; and the compression, None for none."""
    stem, extension = os.path.splitext(name.lower())
    compression = COMPRESSION_EXTENSIONS.get(extension)
    return (stem, compression) if compression else (name.lower(), None)


@contextmanager
def open_stream(path: str) -> Iterator[BinaryIO]:
    """Open a file for reading from its beginning, decompressed if its name or its first bytes say so.

    Raises:
        UsageError: no such file, no permission, a protocol that fsspec does not know.
        PipelineError: the file cannot be read, is truncated or damaged; while reading, too.
    """
    with io.BufferedReader(_Raw(path, _open(path, "readahead"))) as raw:
        _, named = split_compression(file_name(path))
        found = _compression_of(raw.peek(10))
        if named not in (None, found):
            raise PipelineError(
                f"{path}: not a readable {named} file: it begins with {raw.peek(4)[:4]!r}; fetch it again, or take "
                "the extension off its name if it is not compressed"
            )
        if found is None:
            yield raw
            return
        with io.BufferedReader(_Decompressed(path, raw, found)) as decompressed:
            yield decompressed


def read_head(path: str, size: int) -> bytes:
    """The first `size` bytes of a file's content, decompressed. Raises as `open_stream`."""
    with open_stream(path) as stream:
        return stream.read(size)


def read_sample(path: str, size: int) -> tuple[bytes, bytes]:
    """The first `size` bytes of a file as stored, and what can be decompressed of them. Raises as `open_stream`."""
    with io.BufferedReader(_Raw(path, _open(path, "readahead"))) as raw:
        stored = raw.read(size)
    compression = _compression_of(stored)
    if compression is None:
        return stored, stored
    content = bytearray()
    with pa.CompressedInputStream(pa.BufferReader(stored), compression) as stream:
        try:
            while block := stream.read(1 << 16):
                content += block
        except OSError:
            pass  # the sample ends inside of a block; that a file is damaged shows where all of it is read
    return stored, bytes(content)


@contextmanager
def open_random_access(path: str) -> Iterator[pa.NativeFile]:
    """Open a file as it is stored, for Arrow: a local one mapped into memory. Raises as `open_stream`."""
    if is_url(path):
        raw = _Raw(path, _open(path, "none"))
        if not raw.seekable():
            raise PipelineError(f"{path}: the server does not serve parts of a file; download it and name the copy")
        with pa.PythonFile(raw, mode="r") as file:
            yield file
        return
    _open(path, "none").close()  # names what Arrow would only number
    with pa.memory_map(os.fsencode(path)) as file:
        yield file


def size_of(path: str) -> int:
    """Bytes of a file as it is stored. Raises as `size_and_checksum`."""
    if not is_url(path):
        return os.path.getsize(path)
    try:
        return read_size(path)
    except OSError as error:
        raise storage_error(path, error) from error


def size_and_checksum(path: str) -> tuple[int, str]:
    """Bytes of a file as it is stored and their 128-bit BLAKE2b, hexadecimal; all of it is read.

    Raises:
        UsageError: no such file, no permission, a protocol that fsspec does not know.
        PipelineError: the storage cannot be read.
    """
    try:
        return read_checksum(path) if is_url(path) else (os.path.getsize(path), file_checksum(path))
    except OSError as error:
        if is_url(path):
            raise storage_error(path, error) from error
        raise UsageError(f"{path}: cannot read the file: {error.strerror}") from error


def storage_error(url: str, error: Exception) -> PipelineError:
    """The error to raise for one that a storage library raised: a UsageError if there is no such file."""
    # fsspec calls every failure of a web server a missing file.
    if _is_http(url) and isinstance(error.__cause__, Exception) and getattr(error.__cause__, "status", 0) != 404:
        error = error.__cause__
    if isinstance(error, FileNotFoundError):
        return UsageError(f"{url}: no such file, or none that your credentials may see; check the URL")
    return permanent_error(url, error) or unreachable(url, error)


def _is_http(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _compression_of(head: bytes) -> str | None:
    """The compression that a file's first bytes tell."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    # zstd's skippable frames, which parallel compressors write first, begin with a byte from 0x50 to 0x5f.
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return "zstd"
    # "BZh" and a digit might be text; digits of pi follow it, or of its root in an empty file.
    if head.startswith(b"BZh") and head[4:10] in (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90"):
        return "bz2"
    return None


def _open(path: str, cache_type: str) -> Any:
    """A file object; `cache_type` is fsspec's."""
    if not is_url(path):
        try:
            return open(path, "rb", buffering=0)
        except OSError as error:
            raise UsageError(f"{path}: cannot open the file: {error.strerror}") from error
    filesystem, inner = open_filesystem(path)
    try:
        return filesystem.open(inner, "rb", block_size=REQUEST_BYTES, cache_type=cache_type)
    except Exception as error:  # storage libraries share no base class
        raise storage_error(path, error) from error


class _Raw(io.RawIOBase):
    """A file object whose errors of reading name the file."""

    def __init__(self, path: str, file: Any) -> None:
        self._path = path
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            block = self._file.read(len(buffer))
        except Exception as error:  # storage libraries share no base class
            if is_url(self._path):
                raise storage_error(self._path, error) from error
            raise PipelineError(f"{self._path}: cannot read the file: {one_line(error)}") from error
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Decompressed(io.RawIOBase):
    """The decompressed content of a stream; several compressed streams in a row are read as one."""

    def __init__(self, path: str, compressed: BinaryIO, compression: str) -> None:
        self._path = path
        self._compression = compression
        self._stream = pa.CompressedInputStream(pa.PythonFile(compressed, mode="r"), compression)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            block = self._stream.read(len(buffer))
        except OSError as error:
            if "Truncated" in str(error):
                raise PipelineError(
                    f"{self._path}: the {self._compression} file is truncated; fetch it again"
                ) from error
            raise PipelineError(
                f"{self._path}: not a readable {self._compression} file ({one_line(error)}); fetch it again"
            ) from error
        buffer[: len(block)] = block
        return len(block)
