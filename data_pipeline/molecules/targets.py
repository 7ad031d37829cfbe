"""What molecule-level objectives predict: a Morgan count fingerprint of each molecule, and descriptors of RDKit.

Both are functions of the canonical SMILES that is stored: the molecule is read from it again. So they are computed
last, when duplicates are gone, and are the same whichever spelling of the molecule was read.
"""

from array import array
from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from rdkit import rdBase
from rdkit.Chem import rdFingerprintGenerator, rdMolDescriptors

from data_pipeline.execution.watch import Watch
from data_pipeline.molecules.chemistry import rdkit_errors, reread
from data_pipeline.molecules.rejects import MoleculeReject
from data_pipeline.schema import (
    DESCRIPTORS,
    FINGERPRINT_BINS,
    FINGERPRINT_RADIUS,
    MAX_FINGERPRINT_COUNT,
    MOLECULE_SCHEMA,
    shard_schema,
)

# What `rdMolDescriptors.Properties`, which computes many descriptors in one call, calls them.
_PROPERTIES = {
    "MolWt": "amw",
    "MolLogP": "CrippenClogP",
    "MolMR": "CrippenMR",
    "TPSA": "tpsa",
    "LabuteASA": "labuteASA",
    "FractionCSP3": "FractionCSP3",
    "NumHeteroatoms": "NumHeteroatoms",
    "NumHDonors": "NumHBD",
    "NumHAcceptors": "NumHBA",
    "NumRotatableBonds": "NumRotatableBonds",
    "NumAmideBonds": "NumAmideBonds",
    "RingCount": "NumRings",
    "NumAromaticRings": "NumAromaticRings",
    "NumAliphaticRings": "NumAliphaticRings",
    "NumSaturatedRings": "NumSaturatedRings",
    "NumHeterocycles": "NumHeterocycles",
    "NumSpiroAtoms": "NumSpiroAtoms",
    "NumBridgeheadAtoms": "NumBridgeheadAtoms",
    "HallKierAlpha": "hallKierAlpha",
    "Kappa1": "kappa1",
}


class Targets(NamedTuple):
    """Of one molecule: the bins that are not 0, uint16 [c], ascending; their counts, uint8 [c]; float64 [T]."""

    bins: np.ndarray
    counts: np.ndarray
    descriptors: np.ndarray


def with_targets(molecules: pa.RecordBatch, watch: Watch, first_row: int = 0) -> pa.RecordBatch:
    """Molecules with `MOLECULE_SCHEMA`, with the columns of `schema.TARGET_FIELDS` added.

    `watch` is told of each molecule, numbered from `first_row` on. One that RDKit cannot do is stored without targets.
    """
    rows = molecules.num_rows
    # As compact as they are stored: a shard may have many rows.
    bins, counts, lengths = array("H"), array("B"), np.zeros(rows + 1, np.int32)
    descriptors = np.full((rows, len(DESCRIPTORS)), np.nan, np.float32)
    with rdBase.BlockLogs():
        for row, smiles in enumerate(molecules.column("smiles")):
            try:
                watch.at(first_row + row)
                with rdkit_errors():
                    found = molecule_targets(smiles.as_py())
            except MoleculeReject:
                continue
            bins.frombytes(found.bins.tobytes())
            counts.frombytes(found.counts.tobytes())
            lengths[row + 1] = len(found.bins)
            descriptors[row] = found.descriptors
    watch.rest()
    offsets = pa.array(np.cumsum(lengths, dtype=np.int32))
    columns = [
        *(molecules.column(name) for name in MOLECULE_SCHEMA.names),
        pa.ListArray.from_arrays(offsets, pa.array(np.array(bins, np.uint16))),
        pa.ListArray.from_arrays(offsets, pa.array(np.array(counts, np.uint8))),
        pa.FixedSizeListArray.from_arrays(pa.array(descriptors.reshape(-1)), len(DESCRIPTORS)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=shard_schema(targets=True))


def molecule_targets(smiles: str) -> Targets:
    """The targets of a canonical SMILES. A descriptor that is not finite is NaN.

    Raises:
        MoleculeReject: RDKit cannot read `smiles`.
    """
    mol = reread(smiles).mol
    generator, properties = _calculators()
    counts = generator.GetCountFingerprintAsNumPy(mol)
    bins = np.flatnonzero(counts).astype(np.uint16)
    descriptors = np.array(properties.ComputeProperties(mol))
    descriptors[~np.isfinite(descriptors)] = np.nan
    return Targets(bins, np.minimum(counts[bins], MAX_FINGERPRINT_COUNT).astype(np.uint8), descriptors)


@cache
def _calculators() -> tuple[rdFingerprintGenerator.FingerprintGenerator64, rdMolDescriptors.Properties]:
    """RDKit's objects of this process. Morgan environments are told apart without stereo, as in ECFP."""
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=FINGERPRINT_RADIUS, fpSize=FINGERPRINT_BINS)
    return generator, rdMolDescriptors.Properties([_PROPERTIES[name] for name in DESCRIPTORS])
