"""Reading a source as a user names it, and writing it as users find it."""

import bz2
import gzip
from pathlib import Path

import zstandard

from data_pipeline.sources.source import check_columns, read_chunks, resolve_sources


def _zstd(data: bytes) -> bytes:
    """As the zstd command writes it, which the package does not by itself: with a checksum."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": _zstd}


def write(path: Path, content: str | bytes) -> Path:
    """Write a file, compressed if its extension says so."""
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(COMPRESSORS.get(path.suffix, bytes)(data))
    return path


def read(name: Path | str, format: str | None = None, **columns: str) -> list[tuple[str, str]]:
    """The rows (text, id) of all files behind a name."""
    return [
        row
        for source in resolve_sources([str(name)], format)
        for chunk in read_chunks(source, **columns)
        for row in zip(chunk.texts, chunk.ids, strict=True)
    ]


def check(name: Path | str, smiles_column: str | None = None, id_column: str | None = None) -> None:
    """What is done before the work starts."""
    for source in resolve_sources([str(name)]):
        check_columns(source, smiles_column, id_column)
