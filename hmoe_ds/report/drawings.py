"""Molecules as drawings (SVG)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rdkit import Chem
from rdkit.Chem.Draw import rdMolDraw2D

from hmoe_ds.report.palette import rgb


def draw_molecule(smiles: str, size: tuple[int, int], colors: Mapping[int, str] | None = None) -> str:
    """The molecule as SVG without a background.

    Args:
        smiles: canonical, as in a dataset: its atoms are numbered in the order in which they are written.
        size: width and height in pixels.
        colors: of circles around atoms, by their numbers; a bond between two of one colour has it, too.
    """
    molecule = Chem.MolFromSmiles(smiles)
    kekulize = molecule is not None
    if molecule is None:  # a scaffold that was cut out of a molecule may have no Kekulé structure
        molecule = Chem.MolFromSmiles(smiles, sanitize=False)
    drawer = rdMolDraw2D.MolDraw2DSVG(*size)
    options: Any = drawer.drawOptions()  # whose stubs know no plain values
    options.clearBackground = False
    options.bondLineWidth = 1.4
    options.padding = 0.06
    options.fixedBondLength = 26.0
    if colors is None:
        rdMolDraw2D.PrepareAndDrawMolecule(drawer, molecule, kekulize=kekulize)
    else:
        atoms = {atom: _light(color) for atom, color in colors.items()}
        bonds = {
            bond.GetIdx(): atoms[bond.GetBeginAtomIdx()]
            for bond in molecule.GetBonds()
            if bond.GetBeginAtomIdx() in colors and colors[bond.GetBeginAtomIdx()] == colors.get(bond.GetEndAtomIdx())
        }
        options.highlightRadius = 0.36
        rdMolDraw2D.PrepareAndDrawMolecule(
            drawer,
            molecule,
            highlightAtoms=list(atoms),
            highlightBonds=list(bonds),
            highlightAtomColors=atoms,
            highlightBondColors=bonds,
            kekulize=kekulize,
        )
    drawer.FinishDrawing()
    svg: str = drawer.GetDrawingText()
    return svg[svg.index("<svg") :]


def _light(color: str) -> tuple[float, float, float]:
    """Mixed with white, so that letters on it can be read."""
    red, green, blue = (1 - 0.55 * (1 - part) for part in rgb(color))
    return red, green, blue
