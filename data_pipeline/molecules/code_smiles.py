"""A graph code whose labels are atoms and bonds -> its canonical SMILES without stereo, by RDKit."""

import numpy as np
from numba import njit
from rdkit import Chem

from data_pipeline.molecules.graph_code import EDGE_BYTES, VERTEX_BYTES

CHARGE_OFFSET = 5
# The label of an atom: atomic number, charge + 5 and the flags, hydrogens; one byte each. The label of a bond is its
# OGB feature.
_CHARGE, _AROMATIC, _OPEN = 0x0F, 0x10, 0x20
_ELEMENTS = [Chem.GetPeriodicTable().GetElementSymbol(number) for number in range(119)]
_SYMBOLS = np.array([list(symbol.encode().ljust(2, b"\0")) for symbol in _ELEMENTS], dtype=np.uint8)
_AROMATIC_SYMBOLS = np.array([list(symbol.lower().encode().ljust(2, b"\0")) for symbol in _ELEMENTS], dtype=np.uint8)
_NEEDS_NO_BRACKETS = np.isin(_ELEMENTS, ["B", "C", "N", "O", "P", "S", "F", "Cl", "Br", "I"])
_BOND_SYMBOLS = np.frombuffer(b"-=#:", dtype=np.uint8)
_SINGLE_BOND, _AROMATIC_BOND = 0, 3
_OPEN_BRACKET, _CLOSE_BRACKET, _OPEN_NUMBER, _CLOSE_NUMBER, _PERCENT, _DOT, _HYDROGEN, _PLUS, _MINUS, _ZERO = (
    ord(char) for char in "[]()%.H+-0"
)
# The longest texts of an atom, "[XxH255+5]", and of both ends of a closure, "=%(12345)".
_ATOM_TEXT, _CLOSURE_TEXT = 10, 18


@njit(cache=True)
def atom_label(number: int, charge: int, hydrogens: int, is_aromatic: bool, is_open: bool) -> int:
    """The label of an atom with -5 <= charge <= 5. An open atom gets further hydrogens, as many as RDKit finds fit."""
    flags = (charge + CHARGE_OFFSET) | (_AROMATIC if is_aromatic else 0) | (_OPEN if is_open else 0)
    return np.uint32(number | flags << 8 | hydrogens << 16)


def code_smiles(code: bytes) -> str:
    """The SMILES of the molecule with this code: '' for an empty code. Nothing is sanitised.

    Raises:
        ValueError: RDKit cannot read what this code spells.
    """
    if not code:
        return ""
    text, open_atoms = _spell(np.frombuffer(code, dtype=np.uint8))
    smiles = text.tobytes().decode()
    mol = Chem.MolFromSmiles(smiles, sanitize=False)
    if mol is None:
        raise ValueError(f"RDKit cannot read the SMILES of a graph: {smiles}")
    for index in open_atoms.tolist():
        mol.GetAtomWithIdx(index).SetNoImplicit(False)
    # Hydrogens are counted by MolToSmiles; it would do the same for the rings, but twice.
    Chem.GetSymmSSSR(mol)
    return Chem.MolToSmiles(mol, isomericSmiles=False)


@njit(cache=True)
def _spell(code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A SMILES with the atoms in the order of the code (uint8), and which of them are open, yet in brackets (int64).

    An atom follows the one before it along their bond, or after a dot; all other bonds are ring closures.
    """
    capacity = len(code) // EDGE_BYTES
    starts = np.empty(capacity, dtype=np.int32)  # of each atom, in the code
    parent_bond = np.empty(capacity, dtype=np.int32)  # -1: none
    closures = np.empty((capacity, 3), dtype=np.int32)  # earlier atom, later atom, bond
    n = num_closures = at = 0
    while at < len(code):
        starts[n], parent_bond[n] = at, -1
        bonds = np.int64(code[at + 4]) | np.int64(code[at + 5]) << 8
        at += VERTEX_BYTES
        for _ in range(bonds):
            earlier = np.int64(code[at]) | np.int64(code[at + 1]) << 8
            if earlier == n - 1:
                parent_bond[n] = code[at + 2]
            else:
                closures[num_closures, 0], closures[num_closures, 1] = earlier, n
                closures[num_closures, 2] = code[at + 2]
                num_closures += 1
            at += EDGE_BYTES
        n += 1
    text = np.empty(n * (_ATOM_TEXT + 1) + num_closures * _CLOSURE_TEXT, dtype=np.uint8)
    open_atoms = np.empty(n, dtype=np.int64)
    num_open = at = 0
    for atom in range(n):
        start = starts[atom]
        if atom > 0 and parent_bond[atom] < 0:
            text[at] = _DOT
            at += 1
        elif atom > 0:
            at = _write_bond(text, at, parent_bond[atom], code[start + 1] & code[starts[atom - 1] + 1])
        at, is_open = _write_atom(text, at, code[start], code[start + 1], code[start + 2])
        if is_open:
            open_atoms[num_open] = atom
            num_open += 1
        for closure in range(num_closures):
            first, second, bond = closures[closure]
            if first == atom or second == atom:
                at = _write_bond(text, at, bond, code[starts[first] + 1] & code[starts[second] + 1])
                at = _write_closure(text, at, closure + 1)
    return text[:at], open_atoms[:num_open]


@njit(cache=True)
def _write_bond(text: np.ndarray, at: int, bond: int, shared_flags: int) -> int:
    """Write a bond unless it goes without saying."""
    if bond == (_AROMATIC_BOND if shared_flags & _AROMATIC else _SINGLE_BOND):
        return at
    text[at] = _BOND_SYMBOLS[bond]
    return at + 1


@njit(cache=True)
def _write_closure(text: np.ndarray, at: int, number: int) -> int:
    if number < 10:
        text[at] = _ZERO + number
        return at + 1
    text[at], text[at + 1] = _PERCENT, _OPEN_NUMBER
    at = _write_number(text, at + 2, number)
    text[at] = _CLOSE_NUMBER
    return at + 1


@njit(cache=True)
def _write_number(text: np.ndarray, at: int, number: int) -> int:
    size = 1
    while number >= 10**size:
        size += 1
    for digit in range(size):
        text[at + size - 1 - digit] = _ZERO + number // 10**digit % 10
    return at + size


@njit(cache=True)
def _write_atom(text: np.ndarray, at: int, number: int, flags: int, hydrogens: int) -> tuple[int, bool]:
    """Write an atom; where the text ends then, and whether the atom is open, yet in brackets."""
    charge = np.int64(flags & _CHARGE) - CHARGE_OFFSET
    is_open = (flags & _OPEN) != 0
    is_aromatic = (flags & _AROMATIC) != 0
    is_bare = is_open and not is_aromatic and charge == 0 and hydrogens == 0 and _NEEDS_NO_BRACKETS[number]
    if not is_bare:
        text[at] = _OPEN_BRACKET
        at += 1
    symbol = _AROMATIC_SYMBOLS[number] if is_aromatic else _SYMBOLS[number]
    for char in symbol:
        if char:
            text[at] = char
            at += 1
    if hydrogens > 0:
        text[at] = _HYDROGEN
        at = _write_number(text, at + 1, np.int64(hydrogens))
    if charge != 0:
        text[at] = _PLUS if charge > 0 else _MINUS
        at = _write_number(text, at + 1, abs(charge))
    if not is_bare:
        text[at] = _CLOSE_BRACKET
        at += 1
    return at, is_open and not is_bare
