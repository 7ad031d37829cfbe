"""Chunks of molecules by the fast decoder, which is tested once in each process, and checked on a sample of molecules.

`reference.describe` says what is right. A molecule that the fast decoder does not know is left to it.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from rdkit import Chem, rdBase

from data_pipeline.molecules.chemistry import CanonicalMolecule, reread
from data_pipeline.molecules.featurize_fast import ChunkArrays, WrittenMolecule, featurize_chunk, unknown_chunk, written
from data_pipeline.molecules.reference import Description, describe
from data_pipeline.molecules.rejects import MoleculeReject
from data_pipeline.molecules.scaffold import ScaffoldIdentity, scaffold_identity
from data_pipeline.molecules.scaffold_fast import scaffold_codes, scaffold_of

# Set to "reference", it keeps the fast decoder from being used.
FEATURIZE_VARIABLE = "HMOE_FEATURIZE"

# Each field of the binary format, and what is hard to get right without reading the SMILES again.
_SELF_TEST = (
    *(
        "C",
        "CC#N",
        "c1ccccc1",
        "C[N+](C)(C)CC([O-])=O",
        "[13CH3][C@@H](F)Cl",
        "N[C@H](C)C(=O)O",
        "O=C=O",
        "CS(C)(=O)=O",
    ),
    *("F/C=C/F", "C/C=C\\C=C\\C", "O[C@H]1CC[C@@H](N)CC1", "C[C@]12CC[C@H](O)C[C@@H]1CC[C@@H]2O", "[Na+].[Cl-]"),
    *("FS(F)(F)(F)(F)c1ccccc1", "FP(F)(F)(F)F", "C[Si](C)(C)C#CBr", "OB(O)c1ccsc1I", "c1c[nH]cn1"),
    *("Cn1cnc2c1c(=O)n(C)c(=O)n2C", "C[n+]1ccccc1-c1cccc2ccccc12", "C[NH+]1CCN(Cc2ccccc2)CC1", "C1CC2CCC1C2"),
    *(
        "CN=C1CCCCC1=NO",
        "C1CCC2(CC1)OCC1(CCCCC1)O2",
        "c1ccc2c(c1)Cc1ccccc1-2",
        "O=c1cc[nH]c2ccccc12.OCC",
        "C1#CCCCCCC1",
    ),
    *("O=C(/C=C/c1ccccc1)N/N=C/c1ccco1", "C[C@@H]1CC[C@H]([C@@H]2[C@H]3CC[C@@H](C3)N2C)O1", "[O-][n+]1onc2ccccc21"),
    "C[C@H](O)" + "C" * 260 + "c1ccccc1",
)
# The first byte of the key of a molecule that is checked: 1 of 256.
_SAMPLED = 0

_log = logging.getLogger(__name__)


class WrongDecoder(Exception):  # noqa: N818 - a finding, which is dealt with
    """The fast decoder is wrong about a molecule."""


@dataclass(frozen=True)
class FastChunk:
    """The arrays of K molecules, the mask of their scaffolds' atoms (uint8 [N]), and the codes of the scaffolds."""

    arrays: ChunkArrays
    scaffold_mask: np.ndarray
    codes: list[bytes]

    def scaffold(self, index: int) -> ScaffoldIdentity:
        """The scaffold of an exact molecule; RDKit works it out unless it is in the memo."""
        code = self.codes[index]
        return scaffold_of(code) if code else scaffold_identity("")


def flatten(molecule: CanonicalMolecule) -> WrittenMolecule:
    """What `describe_chunk` takes of a molecule."""
    return written(molecule) if is_usable() else WrittenMolecule(molecule.smiles, binary=b"", order="")


def describe_chunk(molecules: Sequence[WrittenMolecule]) -> FastChunk:
    """What the fast decoder makes of `molecules`; it knows none of them where it is not usable."""
    return _decoded(featurize_chunk(molecules) if is_usable() else unknown_chunk(len(molecules)))


def unknown(count: int) -> FastChunk:
    """A chunk of `count` molecules that are all left to the reference."""
    return _decoded(unknown_chunk(count))


def _decoded(arrays: ChunkArrays) -> FastChunk:
    return FastChunk(arrays, *scaffold_codes(arrays))


def check(molecule: WrittenMolecule, key: bytes, chunk: FastChunk, index: int) -> None:
    """Compare an exact molecule of a chunk with the reference, if its key says that it is in the sample.

    Raises:
        WrongDecoder: they differ.
    """
    if key[0] != _SAMPLED:
        return
    try:
        agrees = _agrees(chunk, index, describe(molecule.smiles))
    except MoleculeReject:
        agrees = False
    if not agrees:
        raise WrongDecoder(
            f"the fast decoder encodes {molecule.smiles} otherwise than RDKit {rdBase.rdkitVersion} does; "
            "please report this SMILES"
        )


@cache
def is_usable() -> bool:
    """Whether this process may use the fast decoder: it is not switched off, and reads the test molecules rightly."""
    if os.environ.get(FEATURIZE_VARIABLE) == "reference":
        return False
    is_right = self_test()
    if not is_right:
        _log.warning("RDKit %s: unknown binary format; molecules are encoded the slow way", rdBase.rdkitVersion)
    return is_right


def self_test() -> bool:
    """Whether the fast decoder knows all test molecules, and agrees with the reference on them.

    Each is tried as read from a text whose atoms are in another order than in the canonical SMILES, and as reread.
    """
    with rdBase.BlockLogs():
        molecules = []
        for text in _SELF_TEST:
            mol = Chem.MolFromSmiles(text)
            backwards = Chem.RenumberAtoms(mol, list(reversed(range(mol.GetNumAtoms()))))
            smiles = Chem.MolToSmiles(backwards)
            try:
                molecules += [written(CanonicalMolecule(smiles, backwards, is_reread=False)), written(reread(smiles))]
            except KeyError:  # this RDKit does not tell in which order it wrote
                return False
        chunk = _decoded(featurize_chunk(molecules))
        return bool(chunk.arrays.is_exact.all()) and all(
            _agrees(chunk, index, describe(molecule.smiles)) for index, molecule in enumerate(molecules)
        )


def _agrees(chunk: FastChunk, index: int, expected: Description) -> bool:
    arrays = chunk.arrays
    atoms = slice(arrays.atom_offsets[index], arrays.atom_offsets[index + 1])
    bonds = slice(arrays.bond_offsets[index], arrays.bond_offsets[index + 1])
    return (
        np.array_equal(arrays.atom_features[atoms], expected.arrays.atom_features)
        and np.array_equal(arrays.bond_index[bonds], expected.arrays.bond_index)
        and np.array_equal(arrays.bond_features[bonds], expected.arrays.bond_features)
        and np.array_equal(chunk.scaffold_mask[atoms], expected.scaffold_mask)
        and chunk.scaffold(index) == expected.scaffold
    )
