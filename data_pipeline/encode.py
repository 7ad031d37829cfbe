"""SMILES texts -> rows of a dataset, and the rejects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from rdkit import Chem, rdBase

from data_pipeline.chemistry import DEFAULT_MAX_ATOMS, MoleculeReject, canonical_molecule
from data_pipeline.complexity import complexity
from data_pipeline.featurize import MoleculeArrays, featurize
from data_pipeline.keys import digest128
from data_pipeline.scaffold import ScaffoldIdentity, murcko_scaffold, scaffold_identity
from data_pipeline.schema import MOLECULE_SCHEMA, REJECT_SCHEMA, REJECT_TEXT_LIMIT, storable
from data_pipeline.standardize import Standardizer, standardizer


@dataclass(frozen=True)
class Reject:
    """A text that gave no molecule: its index among the texts, the text cut short, the reason."""

    index: int
    text: str
    reason: str


@dataclass(frozen=True)
class EncodedRows:
    """What became of a list of texts.

    batch: the molecules, with `schema.MOLECULE_SCHEMA`; scaffold_smiles: of each molecule;
    kept: int64 [molecules], the index of each molecule's text, ascending;
    rejects: the other texts, ascending by index; standardized: molecules that standardisation changed.
    """

    batch: pa.RecordBatch
    scaffold_smiles: list[str]
    kept: np.ndarray
    rejects: list[Reject]
    standardized: int


@dataclass(frozen=True)
class _Molecule:
    smiles: str
    standardized: bool
    arrays: MoleculeArrays
    scaffold_smiles: str
    scaffold: ScaffoldIdentity
    scaffold_mask: np.ndarray
    complexity: int


def encode_rows(
    texts: Sequence[str],
    ids: Sequence[str],
    max_atoms: int = DEFAULT_MAX_ATOMS,
    standardize: bool = True,
    at: Callable[[int], None] | None = None,
) -> EncodedRows:
    """Encode SMILES `texts` with their `ids`. A text that is no molecule becomes a reject, never an error.

    The result depends on each text alone, not on the texts around it. Duplicates are kept. `standardize`: encode the
    standard form of each molecule (`standardize.Standardizer`); `max_atoms` counts the atoms before that.
    """
    standard = standardizer() if standardize else None
    molecules: list[_Molecule] = []
    kept: list[int] = []
    rejects: list[Reject] = []
    with rdBase.BlockLogs():
        for index, text in enumerate(texts):
            try:
                if at is not None:
                    at(index)
                molecules.append(_encode(text, max_atoms, standard))
            except MoleculeReject as reject:
                rejects.append(Reject(index, storable(text[:REJECT_TEXT_LIMIT]), reject.reason))
            else:
                kept.append(index)
    batch = _to_batch(molecules, [ids[index] for index in kept])
    scaffold_smiles = [molecule.scaffold_smiles for molecule in molecules]
    standardized = sum(molecule.standardized for molecule in molecules)
    return EncodedRows(batch, scaffold_smiles, np.array(kept, dtype=np.int64), rejects, standardized)


def reject_batch(source: str, first_row: int, rejects: Sequence[Reject]) -> pa.RecordBatch:
    """The rejects of a chunk that begins at row `first_row` of `source`, with `schema.REJECT_SCHEMA`."""
    columns = (
        [source] * len(rejects),
        [first_row + reject.index for reject in rejects],
        [reject.text for reject in rejects],
        [reject.reason for reject in rejects],
    )
    arrays = [pa.array(column, field.type) for column, field in zip(columns, REJECT_SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=REJECT_SCHEMA)


def _encode(text: str, max_atoms: int, standard: Standardizer | None) -> _Molecule:
    """One molecule, or MoleculeReject with the reason."""
    try:
        smiles, mol = found = canonical_molecule(text, max_atoms)
        if standard is not None:
            smiles, mol = standard.standardize(*found)
        return _describe(smiles, mol, standardized=smiles != found[0])
    except MoleculeReject:
        raise
    except (RuntimeError, ValueError) as error:
        # What RDKit raises for a broken invariant; one molecule must not stop a run.
        raise MoleculeReject("rdkit_error") from error


def _describe(smiles: str, mol: Chem.Mol, standardized: bool) -> _Molecule:
    arrays = featurize(mol)
    scaffold_smiles, scaffold_mask = murcko_scaffold(mol)
    return _Molecule(
        smiles=smiles,
        standardized=standardized,
        arrays=arrays,
        scaffold_smiles=scaffold_smiles,
        scaffold=scaffold_identity(scaffold_smiles),
        scaffold_mask=scaffold_mask,
        complexity=complexity(arrays, num_fragments=smiles.count(".") + 1),
    )


def _to_batch(molecules: list[_Molecule], ids: list[str]) -> pa.RecordBatch:
    def column(value: Callable[[_Molecule], object]) -> list[object]:
        return [value(molecule) for molecule in molecules]

    def lists(value: Callable[[_Molecule], np.ndarray], dtype: type[np.generic]) -> pa.ListArray:
        return _list_array([value(molecule).reshape(-1) for molecule in molecules], dtype)

    columns = {
        "smiles": column(lambda molecule: molecule.smiles),
        "source_id": ids,
        "mol_key": column(lambda molecule: digest128(molecule.smiles.encode())),
        "atom_features": lists(lambda molecule: molecule.arrays.atom_features, np.uint8),
        "bond_index": lists(lambda molecule: molecule.arrays.bond_index, np.uint16),
        "bond_features": lists(lambda molecule: molecule.arrays.bond_features, np.uint8),
        "scaffold_key": column(lambda molecule: molecule.scaffold.key),
        "generic_key": column(lambda molecule: molecule.scaffold.generic_key),
        "scaffold_mask": lists(lambda molecule: molecule.scaffold_mask, np.uint8),
        "num_atoms": column(lambda molecule: len(molecule.arrays.atom_features)),
        "num_bonds": column(lambda molecule: len(molecule.arrays.bond_features)),
        "complexity": column(lambda molecule: float(molecule.complexity)),
    }
    arrays = [pa.array(columns[field.name], type=field.type) for field in MOLECULE_SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=MOLECULE_SCHEMA)


def _list_array(rows: list[np.ndarray], dtype: type[np.generic]) -> pa.ListArray:
    """An Arrow list column from one array per row."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate(rows) if rows else np.empty(0, dtype=dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=pa.from_numpy_dtype(dtype)))
