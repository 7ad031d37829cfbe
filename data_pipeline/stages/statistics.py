"""Counts and sums over the molecules of a split, which add up over its parts: what training must know beforehand."""

import math
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pyarrow as pa

from data_pipeline.manifest import DescriptorRecord
from data_pipeline.molecules.scaffold import ACYCLIC_KEY
from data_pipeline.schema import DESCRIPTORS

# Descriptors are summed as whole numbers of this unit: such sums are exact, so they depend on no order.
_UNIT = Fraction(1, 1 << 32)


@dataclass
class DescriptorSums:
    """Of each descriptor (`schema.DESCRIPTORS`): the molecules that have it, its sum and its sum of squares.

    In units of 2^-32 and of its square.
    """

    count: list[int] = field(default_factory=lambda: [0] * len(DESCRIPTORS))
    total: list[int] = field(default_factory=lambda: [0] * len(DESCRIPTORS))
    squares: list[int] = field(default_factory=lambda: [0] * len(DESCRIPTORS))

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "DescriptorSums":
        """Sums over a batch with the columns of `schema.TARGET_FIELDS`; zeros without them."""
        sums = cls()
        if "descriptors" in batch.schema.names:
            values = batch.column("descriptors").flatten().to_numpy().reshape(-1, len(DESCRIPTORS))
            for index, column in enumerate(values.astype(np.float64).T):
                # Python's integers: squares do not fit into 64 bits.
                units = np.rint(column[np.isfinite(column)] / float(_UNIT)).astype(np.int64).tolist()
                sums.count[index] = len(units)
                sums.total[index] = sum(units)
                sums.squares[index] = sum(unit * unit for unit in units)
        return sums

    def add(self, part: "DescriptorSums") -> None:
        """Add the sums over other molecules."""
        for name in ("count", "total", "squares"):
            setattr(self, name, [a + b for a, b in zip(getattr(self, name), getattr(part, name), strict=True)])

    def records(self) -> list[DescriptorRecord]:
        """Mean and standard deviation of each descriptor, correctly rounded: the same for the same molecules."""
        return [
            DescriptorRecord(name, count, *_mean_and_deviation(count, total, squares))
            for name, count, total, squares in zip(DESCRIPTORS, self.count, self.total, self.squares, strict=True)
        ]


def _mean_and_deviation(count: int, total: int, squares: int) -> tuple[float, float]:
    if count == 0:
        return 0.0, 0.0
    mean = Fraction(total, count)
    return float(mean * _UNIT), math.sqrt((Fraction(squares, count) - mean**2) * _UNIT**2)


@dataclass
class SplitStatistics:
    """Counts over molecules. `complexity` maps each value to its number of molecules; `descriptors`: zeros where there
    are none."""

    rows: int = 0
    atoms: int = 0
    bonds: int = 0
    max_atoms: int = 0
    max_bonds: int = 0
    acyclic: int = 0
    complexity: Counter[float] = field(default_factory=Counter)
    descriptors: DescriptorSums = field(default_factory=DescriptorSums)

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "SplitStatistics":
        """Counts over a batch with a schema that `schema.shard_schema` gives."""
        atoms, bonds, scaffold_keys, complexity = (
            batch.column(name).to_numpy() for name in ("num_atoms", "num_bonds", "scaffold_key", "complexity")
        )
        values, counts = np.unique(complexity, return_counts=True)
        return cls(
            rows=batch.num_rows,
            atoms=int(atoms.sum(dtype=np.int64)),
            bonds=int(bonds.sum(dtype=np.int64)),
            max_atoms=int(atoms.max(initial=0)),
            max_bonds=int(bonds.max(initial=0)),
            acyclic=int(np.count_nonzero(scaffold_keys == ACYCLIC_KEY)),
            complexity=Counter(dict(zip(values.tolist(), counts.tolist(), strict=True))),
            descriptors=DescriptorSums.of(batch),
        )

    def add(self, part: "SplitStatistics") -> None:
        """Add the counts of other molecules."""
        self.rows += part.rows
        self.atoms += part.atoms
        self.bonds += part.bonds
        self.max_atoms = max(self.max_atoms, part.max_atoms)
        self.max_bonds = max(self.max_bonds, part.max_bonds)
        self.acyclic += part.acyclic
        self.complexity.update(part.complexity)
        self.descriptors.add(part.descriptors)

    def complexity_percentiles(self) -> list[float]:
        """Percentiles 0, 1, ..., 100 of complexity, exact: the smallest value that so many reach. [] when empty."""
        if self.rows == 0:
            return []
        values = np.array(sorted(self.complexity))
        cumulative = np.cumsum([self.complexity[value] for value in values.tolist()])
        ranks = np.maximum(np.ceil(np.arange(101) / 100 * self.rows), 1)
        return values[np.searchsorted(cumulative, ranks)].tolist()
