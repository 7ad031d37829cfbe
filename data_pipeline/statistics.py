"""Counts over the molecules of a split, which add up over its parts: what a training plan must know beforehand."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from data_pipeline.scaffold import ACYCLIC_KEY


@dataclass
class SplitStatistics:
    """Counts over molecules. `complexity` maps each value to its number of molecules."""

    rows: int = 0
    atoms: int = 0
    bonds: int = 0
    max_atoms: int = 0
    max_bonds: int = 0
    acyclic: int = 0
    complexity: Counter[float] = field(default_factory=Counter)

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "SplitStatistics":
        """Counts over a batch with `schema.MOLECULE_SCHEMA`."""
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

    def complexity_percentiles(self) -> list[float]:
        """Percentiles 0, 1, ..., 100 of complexity, exact: the smallest value that so many reach. [] when empty."""
        if self.rows == 0:
            return []
        values = np.array(sorted(self.complexity))
        cumulative = np.cumsum([self.complexity[value] for value in values.tolist()])
        ranks = np.maximum(np.ceil(np.arange(101) / 100 * self.rows), 1)
        return values[np.searchsorted(cumulative, ranks)].tolist()
