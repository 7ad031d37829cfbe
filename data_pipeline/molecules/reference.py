"""What a stored row says of its molecule, by RDKit's API alone, one molecule at a time: the definition, and slow."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.molecules.chemistry import reread
from data_pipeline.molecules.featurize import MoleculeArrays, featurize
from data_pipeline.molecules.scaffold import ScaffoldIdentity, murcko_scaffold, scaffold_identity


@dataclass(frozen=True)
class Description:
    """The arrays of a molecule, its scaffold, and the scaffold's atoms: uint8 [n]."""

    arrays: MoleculeArrays
    scaffold: ScaffoldIdentity
    scaffold_mask: np.ndarray


def describe(smiles: str) -> Description:
    """The molecule of a canonical SMILES. Hold a `rdBase.BlockLogs` around many calls.

    Raises:
        MoleculeReject: RDKit cannot read `smiles`.
    """
    mol = reread(smiles).mol
    arrays = featurize(mol)
    scaffold_smiles, scaffold_mask = murcko_scaffold(mol)
    return Description(arrays, scaffold_identity(scaffold_smiles), scaffold_mask)
