"""Texts -> rows of a dataset, and the rejects."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import pyarrow as pa
from rdkit import rdBase

from data_pipeline.execution.watch import Watch
from data_pipeline.keys import digest128
from data_pipeline.molecules import fast_path
from data_pipeline.molecules.chemistry import canonical_molecule, rdkit_errors
from data_pipeline.molecules.complexity import complexity
from data_pipeline.molecules.fast_path import FastChunk
from data_pipeline.molecules.featurize_fast import WrittenMolecule
from data_pipeline.molecules.reference import Description, describe
from data_pipeline.molecules.rejects import MoleculeReject
from data_pipeline.molecules.scaffold import ACYCLIC_KEY, ScaffoldIdentity
from data_pipeline.molecules.scaffold_fast import scaffold_of
from data_pipeline.molecules.standardize import Standardizer, standardizer
from data_pipeline.options import DEFAULT_MAX_ATOMS
from data_pipeline.schema import MOLECULE_SCHEMA, REJECT_SCHEMA, REJECT_TEXT_LIMIT, storable

_log = logging.getLogger(__name__)


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
    rejects: the other texts, ascending by index; standardized: molecules that standardisation changed;
    new_scaffolds: how many scaffold SMILES this call had to work out, the others were in the memo of this process.
    """

    batch: pa.RecordBatch
    scaffold_smiles: list[str]
    kept: np.ndarray
    rejects: list[Reject]
    standardized: int
    new_scaffolds: int


@dataclass(frozen=True)
class _Found:
    """The molecule of the text at `index`."""

    index: int
    molecule: WrittenMolecule
    key: bytes
    standardized: bool


def encode_rows(
    texts: Sequence[str],
    ids: Sequence[str],
    max_atoms: int = DEFAULT_MAX_ATOMS,
    standardize: bool = True,
    watch: Watch | None = None,
) -> EncodedRows:
    """Encode `texts` (SMILES, InChIs, mol blocks) with their `ids`. A text that is no molecule becomes a reject.

    The result depends on each text alone, not on the texts around it. Duplicates are kept. `standardize`: encode the
    standard form of each molecule (`standardize.Standardizer`); `max_atoms` counts the atoms before that. `watch`
    is told of each text before RDKit works on it, more than once for a text.
    """
    watch = watch or Watch()
    # The first time in a process it compiles and tests the decoder, which is not a row's fault.
    fast_path.is_usable()
    known = scaffold_of.cache_info().misses
    reasons: dict[int, str] = {}
    with rdBase.BlockLogs():
        found = _read(texts, max_atoms, standardizer() if standardize else None, watch, reasons)
        chunk = fast_path.describe_chunk([each.molecule for each in found])
        try:
            scaffolds, described = _describe(found, chunk, watch, reasons)
        except fast_path.WrongDecoder as wrong:
            # Which others it is wrong about is not known, so all of these molecules go the slow way.
            _log.warning("%s; it and the %d molecules around it are encoded the slow way", wrong, len(found))
            chunk = fast_path.unknown(len(found))
            scaffolds, described = _describe(found, chunk, watch, reasons)
    batch = _to_batch(found, [ids[each.index] for each in found], chunk, scaffolds, described)
    is_kept = [scaffold is not None for scaffold in scaffolds]
    kept = list(compress(found, is_kept))
    return EncodedRows(
        batch=batch if all(is_kept) else batch.filter(pa.array(is_kept)),
        scaffold_smiles=[scaffold.smiles for scaffold in scaffolds if scaffold is not None],
        kept=np.array([each.index for each in kept], dtype=np.int64),
        rejects=[
            Reject(index, storable(texts[index][:REJECT_TEXT_LIMIT]), reason)
            for index, reason in sorted(reasons.items())
        ],
        standardized=sum(each.standardized for each in kept),
        new_scaffolds=scaffold_of.cache_info().misses - known + len(described),
    )


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


def _read(
    texts: Sequence[str],
    max_atoms: int,
    standard: Standardizer | None,
    watch: Watch,
    reasons: dict[int, str],
) -> list[_Found]:
    """The molecules of `texts`, in order; the reasons why a text has none go to `reasons`."""
    found = []
    for index, text in enumerate(texts):
        try:
            watch.at(index)
            with rdkit_errors():
                first = molecule = canonical_molecule(text, max_atoms)
                if standard is not None:
                    molecule = standard.standardize(first)
                key = digest128(molecule.smiles.encode())
                found.append(_Found(index, fast_path.flatten(molecule), key, molecule.smiles != first.smiles))
        except MoleculeReject as reject:
            reasons[index] = reject.reason
    watch.rest()
    return found


def _describe(
    found: list[_Found], chunk: FastChunk, watch: Watch, reasons: dict[int, str]
) -> tuple[list[ScaffoldIdentity | None], dict[int, Description]]:
    """The scaffold of each molecule; by place in `found` what the reference says of those that `chunk` leaves to it.

    A molecule without a scaffold has to be rejected after all; the reason why goes to `reasons`.
    """
    scaffolds: list[ScaffoldIdentity | None] = []
    described: dict[int, Description] = {}
    is_exact = chunk.arrays.is_exact.tolist()
    for place, each in enumerate(found):
        scaffold = None
        try:
            watch.at(each.index)
            with rdkit_errors():
                if is_exact[place]:
                    fast_path.check(each.molecule, each.key, chunk, place)
                    scaffold = chunk.scaffold(place)
                else:
                    described[place] = describe(each.molecule.smiles)
                    scaffold = described[place].scaffold
        except MoleculeReject as reject:
            reasons[each.index] = reject.reason
        scaffolds.append(scaffold)
    watch.rest()
    return scaffolds, described


def _to_batch(
    found: list[_Found],
    ids: list[str],
    chunk: FastChunk,
    scaffolds: list[ScaffoldIdentity | None],
    described: dict[int, Description],
) -> pa.RecordBatch:
    """All rows of `found`; what stands in the row of a molecule without a scaffold means nothing."""
    arrays = chunk.arrays

    def atoms(
        values: np.ndarray, described_values: Callable[[Description], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        return _replace(values, arrays.atom_offsets, {k: described_values(each) for k, each in described.items()})

    def bonds(
        values: np.ndarray, described_values: Callable[[Description], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        return _replace(values, arrays.bond_offsets, {k: described_values(each) for k, each in described.items()})

    atom_features, atom_offsets = atoms(arrays.atom_features, lambda each: each.arrays.atom_features)
    scaffold_mask, _ = atoms(chunk.scaffold_mask, lambda each: each.scaffold_mask)
    bond_features, bond_offsets = bonds(arrays.bond_features, lambda each: each.arrays.bond_features)
    bond_index, _ = bonds(arrays.bond_index, lambda each: each.arrays.bond_index)
    smiles = [each.molecule.smiles for each in found]
    num_fragments = np.array([text.count(".") + 1 for text in smiles], dtype=np.int64)
    columns = {
        "smiles": smiles,
        "source_id": ids,
        "mol_key": [each.key for each in found],
        "atom_features": _list_array(atom_features, atom_offsets),
        "bond_index": _list_array(bond_index, bond_offsets),
        "bond_features": _list_array(bond_features, bond_offsets),
        "scaffold_key": [scaffold.key if scaffold else ACYCLIC_KEY for scaffold in scaffolds],
        "generic_key": [scaffold.generic_key if scaffold else ACYCLIC_KEY for scaffold in scaffolds],
        "scaffold_mask": _list_array(scaffold_mask, atom_offsets),
        "num_atoms": np.diff(atom_offsets).astype(np.uint16),
        "num_bonds": np.diff(bond_offsets).astype(np.uint16),
        "complexity": complexity(atom_features, atom_offsets, bond_features, bond_offsets, num_fragments),
    }
    return pa.RecordBatch.from_arrays(
        [pa.array(columns[field.name], type=field.type) for field in MOLECULE_SCHEMA], schema=MOLECULE_SCHEMA
    )


def _replace(
    values: np.ndarray, offsets: np.ndarray, replacements: Mapping[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Put a replacement in the place of some molecules' values: the new values and offsets."""
    if not replacements:
        return values, offsets
    lengths = np.diff(offsets)
    pieces, done = [], 0
    for place, replacement in sorted(replacements.items()):
        pieces += [values[done : offsets[place]], replacement]
        done = offsets[place + 1]
        lengths[place] = len(replacement)
    return np.concatenate([*pieces, values[done:]]), np.concatenate([[0], np.cumsum(lengths)])


def _list_array(values: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    """A list column: row k has the values of rows offsets[k] to offsets[k + 1], one after the other."""
    width = values.shape[1] if values.ndim == 2 else 1
    return pa.ListArray.from_arrays(pa.array((width * offsets).astype(np.int32)), pa.array(values.reshape(-1)))
