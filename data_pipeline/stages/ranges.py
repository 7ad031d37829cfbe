"""A partition too large for memory -> ranges of keys, each of which a reduce task can hold.

Partitions are even as hashes are, but for a scaffold with millions of molecules (benzene's), which all have one key.
Its molecules go on by their own keys, in cells. A scaffold's cells follow from its number of rows alone, so the runs
that are cut in them do not depend on the memory.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa

from data_pipeline.execution.task import Task
from data_pipeline.execution.watch import Watch
from data_pipeline.keys import range_starts
from data_pipeline.molecules.scaffold import ACYCLIC_KEY
from data_pipeline.stages.partitions import mol_key_words, read_listing, read_partition

# Rows of one scaffold, about, that stay together.
CELL_ROWS = 1 << 16

# What a mapped molecule takes in memory, about: 535 bytes with 20 atoms.
_ROW_BYTES = 200
_ATOM_BYTES = 22

_KEY_BITS = 64

Size = TypeVar("Size", int, np.ndarray)


def mapped_bytes(rows: Size, atoms: Size) -> Size:
    """What mapped molecules take in memory, about: a number, or int64 of any shape."""
    return rows * _ROW_BYTES + atoms * _ATOM_BYTES


def cell_bits(rows: np.ndarray, cell_rows: int) -> np.ndarray:
    """How many leading bits of mol_key number the cells of a scaffold, by its rows: int64 [n] -> int64 [n]."""
    cells = np.maximum(np.ceil(rows / cell_rows), 1)
    return np.ceil(np.log2(cells)).astype(np.int64)


@dataclass(frozen=True)
class KeyRange:
    """Molecules whose (scaffold_key, first word of mol_key) lies from `lower` up to, not including, `upper`."""

    lower: tuple[int, int] = (0, 0)
    upper: tuple[int, int] | None = None

    def filter(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """The rows, which have both keys, that lie in the range."""
        if self == EVERYTHING:
            return rows
        keys = rows.column("scaffold_key").to_numpy(), mol_key_words(rows.column("mol_key"))[0]
        inside = ~_below(keys, self.lower)
        if self.upper is not None:
            inside &= _below(keys, self.upper)
        return rows.take(pa.array(np.flatnonzero(inside)))


EVERYTHING = KeyRange()


def _below(keys: tuple[np.ndarray, np.ndarray], bound: tuple[int, int]) -> np.ndarray:
    first, second = (np.uint64(word) for word in bound)
    return (keys[0] < first) | ((keys[0] == first) & (keys[1] < second))


@dataclass(frozen=True)
class Cut:
    """Ranges, ascending, that cover a partition; (scaffold_key, `cell_bits`) of the scaffolds with several cells."""

    ranges: list[KeyRange]
    cells: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CutTask(Task[Cut]):
    """Cut partition `partition` of the files that `mapped` lists into ranges of at most `budget` bytes, about."""

    work: str
    mapped: str
    partition: int
    partitions: int
    budget: int
    cell_rows: int

    def __str__(self) -> str:
        return f"partition {self.partition}"

    @property
    def identity(self) -> tuple[object, ...]:
        return (os.path.basename(self.mapped), self.partition, self.partitions, self.budget, self.cell_rows)

    def outputs(self, result: Cut) -> list[str]:
        return []

    def run(self, watch: Watch) -> Cut:
        """Cut the partition, by the keys and sizes of its rows."""
        scaffolds = _scaffolds(read_partition(read_listing(self.mapped), self.partition, self.partitions))
        bits = cell_bits(scaffolds.rows, self.cell_rows)
        bits[scaffolds.keys == ACYCLIC_KEY] = 0
        several = bits > 0
        cells = tuple(zip(scaffolds.keys[several].tolist(), bits[several].tolist(), strict=True))
        return Cut(self._ranges(scaffolds, dict(cells)), cells)

    def _ranges(self, scaffolds: "_Scaffolds", cells: dict[int, int]) -> list[KeyRange]:
        bounds = [(0, 0)]
        held = 0.0
        for key, size in zip(scaffolds.keys.tolist(), scaffolds.bytes.tolist(), strict=True):
            starts = self._acyclic_starts(size) if key == ACYCLIC_KEY else _cell_starts(cells.get(key, 0))
            for start in starts:
                if held and held + size / len(starts) > self.budget:
                    bounds.append((key, start))
                    held = 0.0
                held += size / len(starts)
        return [KeyRange(*pair) for pair in zip(bounds, [*bounds[1:], None], strict=True)]

    def _acyclic_starts(self, size: int) -> list[int]:
        """Acyclic molecules are runs of their own, so they may be cut anywhere in the partition's range of keys."""
        pieces = -(-4 * size // self.budget)
        first, last = ([*range_starts(self.partitions).tolist(), 1 << _KEY_BITS][self.partition + at] for at in (0, 1))
        return [first + index * (last - first) // pieces for index in range(pieces)]


@dataclass(frozen=True)
class _Scaffolds:
    """Distinct scaffold keys, ascending, with the rows of each and what these take in memory: [n] each."""

    keys: np.ndarray
    rows: np.ndarray
    bytes: np.ndarray


def _scaffolds(batches: Iterable[pa.RecordBatch]) -> _Scaffolds:
    """The scaffolds of molecules."""
    total = _Scaffolds(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))
    for batch in batches:
        keys = batch.column("scaffold_key").to_numpy()
        rows = np.ones(len(keys), dtype=np.int64)
        sizes = mapped_bytes(rows, batch.column("num_atoms").to_numpy().astype(np.int64))
        total = _merged(total, _Scaffolds(keys, rows, sizes))
    return total


def _merged(one: _Scaffolds, other: _Scaffolds) -> _Scaffolds:
    keys, place = np.unique(np.concatenate([one.keys, other.keys]), return_inverse=True)
    rows, sizes = (
        np.bincount(place, np.concatenate(pair), len(keys)).astype(np.int64)
        for pair in ((one.rows, other.rows), (one.bytes, other.bytes))
    )
    return _Scaffolds(keys, rows, sizes)


def _cell_starts(bits: int) -> list[int]:
    return [cell << (_KEY_BITS - bits) for cell in range(1 << bits)]
