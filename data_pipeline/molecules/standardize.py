"""Standardisation: the largest fragment of a molecule, its functional groups drawn one way, its charges neutralised.

It maps a canonical SMILES to a canonical SMILES, so the spelling of the source text does not matter; and it goes on
until nothing changes any more, so a standardised SMILES is its own standard form.
"""

from functools import cache

from rdkit import Chem
from rdkit.Chem.MolStandardize import rdMolStandardize

from data_pipeline.molecules.chemistry import CanonicalMolecule, reread
from data_pipeline.molecules.normalizations import NORMALIZATIONS
from data_pipeline.molecules.rejects import MoleculeReject

# Every normalisation and the Uncharger need an atom that is charged, or has more bonds than usual: N, P, As, Sb that
# are not trivalent (the last three with three neighbours), S with three neighbours.
_MAY_CHANGE = Chem.MolFromSmarts("[!+0,#7!v3,#15X3!v3,#33X3!v3,#51X3!v3,#16X3]")
_FRAGMENT_SEPARATOR = "."
# One round is enough but for some 10 in 380,000 real molecules; the last round finds nothing left to do.
_MAX_ROUNDS = 8


class Standardizer:
    """RDKit's MolStandardize objects, which are dear to make. They log: hold a `rdBase.BlockLogs` around many calls."""

    def __init__(self) -> None:
        rules = "".join(f"{name}\t{reaction}\n" for name, reaction in NORMALIZATIONS)
        self._largest_fragment = rdMolStandardize.LargestFragmentChooser()
        self._normalizer = rdMolStandardize.NormalizerFromData(rules, rdMolStandardize.CleanupParameters())
        self._uncharger = rdMolStandardize.Uncharger(canonicalOrder=True)

    def standardize(self, molecule: CanonicalMolecule) -> CanonicalMolecule:
        """The standard form of `molecule`: itself when there is nothing to do.

        Raises:
            MoleculeReject: `standardize`, `unsettled`, `unstable_smiles`.
        """
        if _FRAGMENT_SEPARATOR not in molecule.smiles and not molecule.mol.HasSubstructMatch(_MAY_CHANGE):
            return molecule
        # What the steps do can depend on the order of the atoms.
        smiles, mol, _ = molecule if molecule.is_reread else reread(molecule.smiles)
        for _ in range(_MAX_ROUNDS):
            standard = self._round(smiles, mol)
            if standard == smiles:
                return CanonicalMolecule(smiles, mol, is_reread=True)
            smiles, mol = standard, Chem.MolFromSmiles(standard)
            if mol is None or mol.GetNumAtoms() == 0:
                raise MoleculeReject("standardize")
        raise MoleculeReject("unsettled")

    def _round(self, smiles: str, mol: Chem.Mol) -> str:
        """Canonical SMILES after all steps, once."""
        try:
            if _FRAGMENT_SEPARATOR in smiles:
                mol = self._largest_fragment.choose(mol)
            if mol.HasSubstructMatch(_MAY_CHANGE):
                mol = self._uncharger.uncharge(self._normalizer.normalize(mol))
            return Chem.MolToSmiles(mol)
        except (RuntimeError, ValueError) as error:
            raise MoleculeReject("standardize") from error


@cache
def standardizer() -> Standardizer:
    """The one of this process."""
    return Standardizer()
