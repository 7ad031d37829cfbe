"""A shard's file -> its record batch, which is what the manifest says, or one line that says what else it is.

Datasets come from others, and what reads the columns afterwards trusts their types and lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.manifest import ShardRecord
from data_pipeline.remote import one_line
from data_pipeline.schema import ATOM_FEATURE_SIZES, BOND_FEATURE_SIZES, shard_schema

# Columns that are lists, and how many values each has for an atom or a bond.
_ATOM_LISTS = {"atom_features": len(ATOM_FEATURE_SIZES), "scaffold_mask": 1}
_BOND_LISTS = {"bond_index": 2, "bond_features": len(BOND_FEATURE_SIZES)}


def check_shard_schema(file: pa.NativeFile, name: str, targets: bool) -> None:
    """Raise UsageError unless a shard has the columns of this format version, PipelineError when it cannot be read.

    Args:
        file: of the shard.
        name: of the shard, for messages.
        targets: whether the manifest says that there are columns of molecule-level objectives.
    """
    with _named_errors(name):
        _check_schema(pa.ipc.open_stream(file).schema, name, targets)


def read_shard(file: pa.NativeFile, name: str, record: ShardRecord, targets: bool) -> pa.RecordBatch:
    """The molecules of a shard, without a copy. Args and Raises as `check_shard_schema`; `record`: of the manifest."""
    with _named_errors(name):
        stream = pa.ipc.open_stream(file)
        _check_schema(stream.schema, name, targets)
        batch = stream.read_next_batch()
        batch.validate()  # that buffers are as long as they must be
        _check_rows(batch, name, record)
    return batch


def _check_schema(schema: pa.Schema, name: str, targets: bool) -> None:
    expected = shard_schema(targets)
    if schema.equals(expected):
        return
    for column in (*expected.names, *schema.names):
        found, wanted = (
            str(some.field(column).type) if column in some.names else "no such column" for some in (schema, expected)
        )
        if found != wanted:
            break
    else:
        found, wanted = ", ".join(schema.names), ", ".join(expected.names)
        column = "order"
    raise UsageError(
        f"{name}: its columns are not those of the dataset's format version ({column}: {found}, expected {wanted}); "
        "run `hmoe prepare` again"
    )


def _check_rows(batch: pa.RecordBatch, name: str, record: ShardRecord) -> None:
    columns = {column: batch.column(column) for column in batch.schema.names}
    lengths = {"num_atoms": _ATOM_LISTS, "num_bonds": _BOND_LISTS}
    consistent = batch.num_rows == record.rows and not any(values.null_count for values in columns.values())
    for count, lists in lengths.items():
        for column, each in lists.items() if consistent else ():
            consistent &= _has_lengths(columns[column], columns[count].to_numpy() * np.int64(each))
    if consistent and "fingerprint_bins" in columns:
        bins, counts = columns["fingerprint_bins"], columns["fingerprint_counts"]
        consistent = _has_lengths(bins, np.diff(counts.offsets.to_numpy()))
    if not consistent:
        raise PipelineError(
            f"{name}: its rows do not fit the manifest; copy the dataset again, or run `hmoe prepare` again"
        )


def _has_lengths(lists: pa.ListArray, lengths: np.ndarray) -> bool:
    offsets = lists.offsets.to_numpy()
    return bool(offsets[0] == 0 and offsets[-1] == len(lists.values) and np.array_equal(np.diff(offsets), lengths))


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Arrow's errors as ours, which name the shard."""
    try:
        yield
    except (pa.ArrowException, OSError, StopIteration) as error:
        raise PipelineError(
            f"{name}: not a readable shard ({one_line(error)}); copy the dataset again, or run `hmoe prepare` again"
        ) from error
