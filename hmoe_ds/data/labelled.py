"""A table of labelled molecules: featurised, and split by scaffold."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UsageError
from data_pipeline.molecules.encode import encode_rows
from data_pipeline.stages.reduce_stage import is_held_out
from hmoe_ds.config import ConfigError, ProbeTable
from hmoe_ds.data.store import BatchStore, Shard
from hmoe_ds.data.table import Table

# Of the range of scaffold keys. It is the topmost part, so it takes in what `hmoe prepare` holds out of pretraining.
HELD_OUT = 0.2
_SAMPLE_SEED = 0


@dataclass(frozen=True)
class LabelledMolecules:
    """B molecules with a label each.

    Args:
        store: the molecules.
        label_B: float64; 0 and 1 for two classes.
        unreadable: rows with a label that were left out, as RDKit reads no molecule from them.
    """

    store: BatchStore
    label_B: NDArray[np.float64]
    unreadable: int

    @property
    def molecules(self) -> Shard:
        return self.store.shard(0)

    @property
    def is_classification(self) -> bool:
        """The labels are 0 and 1."""
        return bool(np.isin(self.label_B, (0, 1)).all())

    @cached_property
    def held_out_B(self) -> NDArray[np.bool_]:
        """The molecule is for testing. All molecules of a scaffold are on one side, in every table on the same."""
        return is_held_out(self.molecules.scaffold_key, HELD_OUT)

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of molecules and labels."""
        content = self.molecules.mol_key_n2.tobytes() + self.label_B.tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_labelled(table: ProbeTable, max_molecules: int, standardize: bool) -> LabelledMolecules:
    """Read and featurise `table`.

    Args:
        table: what to read.
        max_molecules: of a larger table, a sample of so many rows, always the same.
        standardize: featurise the standard form of each molecule, as `hmoe prepare` stores it.

    Raises:
        ConfigError: no such file or column, a label that is no number, labels that cannot be learned or tested.
        PipelineError: the file is damaged or out of reach.
    """
    try:
        read = Table.read(table.path)
        smiles, labels = read.structures(table.smiles, option="smiles"), read.labels(table.label)
    except UsageError as error:
        raise ConfigError(f"probe.tables: {error}") from error
    rows = [row for row in zip(smiles, labels.tolist(), strict=True) if not math.isnan(row[1])]
    if len(rows) > max_molecules:
        chosen = np.random.default_rng(_SAMPLE_SEED).choice(len(rows), max_molecules, replace=False)
        rows = [rows[row] for row in np.sort(chosen)]
    encoded = encode_rows([smiles for smiles, _ in rows], [""] * len(rows), standardize=standardize)
    label_B = np.array([label for _, label in rows], np.float64)[encoded.kept]
    molecules = LabelledMolecules(BatchStore(encoded.batch), label_B, len(encoded.rejects))
    _check_sides(table, molecules)
    return molecules


def _check_sides(table: ProbeTable, molecules: LabelledMolecules) -> None:
    """Raise ConfigError unless both sides of the split have different labels."""
    label_B, held_out_B = molecules.label_B, molecules.held_out_B
    if len(np.unique(label_B)) < 2:
        found = f"only the label {label_B[0]:g}" if len(label_B) else "no labelled molecule"
        raise ConfigError(
            f"probe.tables: {table.path} has {found} in column {table.label!r}: expected two classes, or a quantity "
            "that varies; name another column"
        )
    for side, label_S in (("the other", label_B[~held_out_B]), ("the held-out", label_B[held_out_B])):
        if len(np.unique(label_S)) < 2:
            raise ConfigError(
                f"probe.tables: {table.path} has {len(label_S)} molecules with {side} scaffolds of {len(label_B)}, and "
                f"fewer than two different labels among them in column {table.label!r}: give a larger table, or raise "
                "probe.max_molecules"
            )
