"""A molecule that RDKit does not finish in any reasonable time."""

from rdkit import Chem

_ATOMS = 300


def _cage() -> str:
    """Iron atoms in a ring, each bonded to those 1, 2, 3, 5 and 8 places on: ranking them takes for ever."""
    molecule = Chem.RWMol()
    for _ in range(_ATOMS):
        molecule.AddAtom(Chem.Atom("Fe"))
    for step in (1, 2, 3, 5, 8):
        for atom in range(_ATOMS):
            molecule.AddBond(atom, (atom + step) % _ATOMS, Chem.BondType.SINGLE)
    return Chem.MolToSmiles(molecule, canonical=False)


CAGE = _cage()
