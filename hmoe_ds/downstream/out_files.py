"""Files that a command writes: none of them may be what it reads, and their names tell what is in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import UsageError
from data_pipeline.schema import REJECT_SCHEMA
from data_pipeline.sources.formats import format_of_name
from data_pipeline.sources.source import Source
from data_pipeline.sources.streams import split_compression


def check_format(out: Path, format: str) -> None:
    """Refuse a name that promises another format than the one of `formats.FORMATS` that is written.

    Raises:
        UsageError: its extension is that of another format, or of a compression.
    """
    _, compression = split_compression(out.name)
    named = compression or format_of_name(out.name)
    if named not in (None, format):
        raise UsageError(f"--out {out}: the name is that of a {named} file, but {format} is written: give another name")


def check_places(outs: Sequence[Path], model: str) -> None:
    """Refuse files that cannot be written, or are part of the model.

    Args:
        outs: files that are to be written; the first one is `--out`, the others lie beside it.
        model: folder of what does the work.

    Raises:
        UsageError: one of them is a folder, or in the folder of the model.
    """
    for out in outs:
        if out.is_dir():
            raise UsageError(f"{_named(out, outs)} is a folder: give another file to write")
        check_outside(out, model, _named(out, outs))


def check_outside(out: Path, folder: str | Path, name: str) -> None:
    """Raise UsageError if `out`, which messages call `name`, is in a folder that is read, or is that folder."""
    if Path(folder).resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(f"{name} is in the folder of {folder}: give a place elsewhere")


def check_sources(outs: Sequence[Path], sources: Iterable[Source]) -> None:
    """Refuse to write over what is read.

    Raises:
        UsageError: one of the files `outs`, as of `check_places`, is a source.
    """
    for source in sources:
        path = Path(source.path.removeprefix("file://"))
        for out in outs:
            if path.exists() and out.exists() and path.samefile(out):
                raise UsageError(f"{_named(out, outs)} is the source itself: give another file to write")


def check_rejects(outs: Sequence[Path]) -> None:
    """Refuse to write rejects over something else.

    Raises:
        UsageError: one of the files beside `--out`, as of `check_places`, is there and not of rejects.
    """
    for out in filter(Path.exists, outs[1:]):
        try:
            names = pq.read_schema(out).names
        except pa.ArrowInvalid:  # no Parquet
            names = []
        if names != REJECT_SCHEMA.names:
            raise UsageError(f"{_named(out, outs)} holds something else: give another file to write")


def _named(out: Path, outs: Sequence[Path]) -> str:
    return f"--out {out}" if out == outs[0] else f"--out {outs[0]}: {out}, which is written beside it,"
