"""Datasets behind a URL: what fsspec opens, and what its many libraries raise, as errors of ours."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import fsspec

from data_pipeline.errors import PipelineError, UsageError

_BLOCK_BYTES = 16 << 20  # of one request: large beside its latency, small beside memory

# Names of what changes with an object's content, from the one that tells most.
_CHANGING = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "last_modified", "created")

# Protocols for which this project has an extra; for others fsspec says which package is missing.
_EXTRAS = {"s3": "s3", "s3a": "s3"}


def is_url(path: object) -> TypeGuard[str]:
    """True for text with a protocol, such as `s3://bucket/zinc`; a path on this machine has none."""
    return isinstance(path, str) and "://" in path


def join_url(url: str, file: str) -> str:
    """The URL of a file in a folder."""
    return f"{url.rstrip('/')}/{file}"


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the URL's path in it. Nothing is requested from the storage yet.

    Raises:
        UsageError: an unknown protocol, or one whose package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        protocol = url.split("://")[0]
        extra = _EXTRAS.get(protocol)
        mend = f'install it with `pip install "hmoe-ds[{extra}]"`' if extra else one_line(error)
        raise UsageError(f"{url}: {protocol}:// needs a package that is not installed: {mend}") from error
    except Exception as error:  # every file system has errors of its own for what it cannot make sense of
        raise UsageError(f"{url}: {one_line(error)}; expected a URL such as s3://bucket/folder") from error


def read_bytes(url: str) -> bytes:
    """The content of a small object.

    Raises:
        UsageError: as `open_filesystem`.
        FileNotFoundError: no such object.
        PipelineError: it cannot be read.
    """
    filesystem, path = open_filesystem(url)
    return b"".join(_read(url, filesystem, path))


def read_checksum(url: str) -> tuple[int, str]:
    """Size and 128-bit BLAKE2b (hexadecimal) of an object, which is read as a whole. Raises as `read_bytes`."""
    filesystem, path = open_filesystem(url)
    digest, size = hashlib.blake2b(digest_size=16), 0
    for block in _read(url, filesystem, path):
        digest.update(block)
        size += len(block)
    return size, digest.hexdigest()


def read_blocks(filesystem: Any, path: str) -> Iterator[bytes]:
    """The content of an object, a request for each block; raises what the storage library raises."""
    with filesystem.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="none") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def read_size(url: str) -> int:
    """Bytes of an object. Raises as `read_bytes`."""
    filesystem, path = open_filesystem(url)
    with _named_errors(url):
        return filesystem.size(path)


def stamp(url: str) -> str:
    """What the storage says of an object that changes with its content: size, and entity tag, checksum or time.

    Raises:
        As `read_bytes`.
    """
    filesystem, path = open_filesystem(url)
    with _named_errors(url):
        about = filesystem.info(path)
    return f"{about['size']} {next((about[name] for name in _CHANGING if name in about), '')}"


def _read(url: str, filesystem: Any, path: str) -> Iterator[bytes]:
    with _named_errors(url):
        yield from read_blocks(filesystem, path)


@contextmanager
def _named_errors(url: str) -> Iterator[None]:
    """What a storage library raises, but for a missing object, as PipelineError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # storage libraries share no base class
        raise permanent_error(url, error) or unreachable(url, error) from error


def permanent_error(url: str, error: Exception) -> PipelineError | None:
    """The error to raise when asking the storage again cannot help; None when it may.

    Storage libraries share no base class of their errors, but the built-in ones for what is missing or denied.
    """
    if isinstance(error, FileNotFoundError):
        return PipelineError(f"{url}: no such object; upload the dataset again")
    if isinstance(error, PermissionError):
        return PipelineError(
            f"{url}: access denied ({one_line(error)}); give credentials that may read it (docs/object_storage.md)"
        )
    if "credential" in type(error).__name__.lower():
        return PipelineError(
            f"{url}: no credentials ({one_line(error)}); set them in the environment (docs/object_storage.md)"
        )
    return None


def unreachable(url: str, error: Exception) -> PipelineError:
    """The error to raise when asking the storage again did not help either."""
    return PipelineError(
        f"{url}: cannot be read ({one_line(error)}); check the network and the endpoint, then start again"
    )


def one_line(error: Exception) -> str:
    """The text of an error without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
