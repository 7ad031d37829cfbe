"""Content-derived keys: machines that never talked give the same molecule the same key. And checksums."""

import hashlib
from functools import cache
from pathlib import Path

import numpy as np


def digest64(content: bytes) -> int:
    """64-bit BLAKE2b of `content`, read as a little-endian unsigned integer."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def digest128(content: bytes) -> bytes:
    """128-bit BLAKE2b of `content`."""
    return hashlib.blake2b(content, digest_size=16).digest()


def file_checksum(path: str | Path) -> str:
    """128-bit BLAKE2b of a file's bytes, hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_first(*columns: np.ndarray) -> np.ndarray:
    """True where a row differs from the row before it in any column: bool [n]."""
    first = np.ones(len(columns[0]), dtype=bool)
    first[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return first


@cache
def range_starts(count: int) -> np.ndarray:
    """First keys of `count` equal ranges of the 64-bit key space: uint64 [count], ascending from 0; read-only."""
    starts = np.array([-(-(i << 64) // count) for i in range(count)], dtype=np.uint64)
    starts.flags.writeable = False
    return starts


def range_of(keys: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` equal ranges each 64-bit key lies in: uint64 [n] -> int64 [n]."""
    return np.searchsorted(range_starts(count), keys, side="right") - 1
