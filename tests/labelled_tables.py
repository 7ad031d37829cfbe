"""Small tables of real molecules with a label that RDKit computes."""

import csv
from pathlib import Path

from rdkit import Chem, RDConfig


def molecules_of(first, last):
    """SMILES of the NCI molecules `first` to `last`, as RDKit ships them."""
    lines = (Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi").read_text().splitlines()
    return [line.split()[0] for line in lines[first:last]]


def ring_count(molecule):
    return molecule.GetRingInfo().NumRings()


def aromatic_share(molecule):
    return len(molecule.GetAromaticAtoms()) / molecule.GetNumAtoms()


def has_nitrogen(molecule):
    return int(any(atom.GetAtomicNum() == 7 for atom in molecule.GetAtoms()))


def write_table(path, smiles, label):
    """Write columns `smiles` and `label`; what RDKit does not read has the label 0."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["smiles", "label"])
        for text in smiles:
            molecule = Chem.MolFromSmiles(text)
            rows.writerow([text, 0 if molecule is None else label(molecule)])
    return path
