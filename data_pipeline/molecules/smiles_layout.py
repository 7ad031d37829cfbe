"""The canonical SMILES of a molecule, as text -> which atoms and bonds reading it again would give, in which order.

RDKit numbers atoms in the order written. A bond is numbered when its second atom is read, and runs from the earlier
atom to the later; ring closures follow after all others, ascending by their number (%10 is 10), those of one number
in the order written. The bond of a closure runs from the atom where it is closed to the one where it was opened; the
other way round if only the opening says what kind of bond it is. Compared with RDKit in the tests.
"""

import numpy as np
from numba import njit

_OPEN_BRACKET, _CLOSE_BRACKET, _OPEN_BRANCH, _CLOSE_BRANCH, _DOT, _PERCENT, _AT = (ord(char) for char in "[]().%@")
_ZERO, _NINE = ord("0"), ord("9")
_UPPER_B, _UPPER_C, _LOWER_R, _LOWER_L = (ord(char) for char in "BCrl")
_CLOSURE_NUMBERS = 100
_MAX_DEPTH = 1024

_ATOM, _BOND, _UNREADABLE = 0, 1, 2
_KIND = np.full(256, _ATOM, dtype=np.uint8)
_KIND[list(b"-=#:/\\")] = _BOND
_KIND[list(b"$~<>{}*")] = _UNREADABLE


@njit(cache=True)
def read_layout(
    text: np.ndarray,
    start: int,
    stop: int,
    parents: np.ndarray,
    is_bracket: np.ndarray,
    marks: np.ndarray,
    bond_ends: np.ndarray,
    written_at: np.ndarray,
) -> tuple[int, int]:
    """Read the SMILES `text[start:stop]` (uint8), which RDKit wrote, into the first rows of the other arrays.

    parents: int32 [n], the atom that an atom is bonded to when it is read, -1 at the start of a fragment;
    is_bracket: uint8 [n], the atom is in brackets; marks: uint8 [n], how many `@` it has;
    bond_ends: int32 [m, 2], ring closures last; written_at: int32 [m, 2], where in the text each end's atom has the
    bond: the position of the later atom, or of the closure's number.

    Returns how many atoms and bonds; -1 for both if the text has more of them than the arrays have rows, or something
    that is not read here: dummy atoms, bonds other than `-`, `=`, `#`, `:` and slashes, three-digit closures,
    branches too deep.
    """
    opened_at = np.full(_CLOSURE_NUMBERS, -1, dtype=np.int32)
    opening_position = np.empty(_CLOSURE_NUMBERS, dtype=np.int32)
    opened_with_symbol = np.zeros(_CLOSURE_NUMBERS, dtype=np.bool_)
    branch = np.empty(_MAX_DEPTH, dtype=np.int32)
    closure_number = np.empty(len(bond_ends), dtype=np.int32)
    closure_ends = np.empty((len(bond_ends), 4), dtype=np.int32)  # atoms, then where they are written
    atoms = bonds = closures = depth = 0
    previous = -1
    has_symbol = False
    position = start
    while position < stop:
        char = text[position]
        position += 1
        if _KIND[char] == _UNREADABLE:
            return -1, -1
        if _KIND[char] == _BOND:
            has_symbol = True
        elif char == _OPEN_BRANCH:
            if depth == _MAX_DEPTH:
                return -1, -1
            branch[depth] = previous
            depth += 1
        elif char == _CLOSE_BRANCH:
            depth -= 1
            previous = branch[depth]
        elif char == _DOT:
            previous = -1
        elif char == _PERCENT or _ZERO <= char <= _NINE:
            number = char - _ZERO
            if char == _PERCENT:
                if not _ZERO <= text[position] <= _NINE:
                    return -1, -1
                number = 10 * (text[position] - _ZERO) + text[position + 1] - _ZERO
                position += 2
            if opened_at[number] < 0:
                opened_at[number] = previous
                opening_position[number] = position
                opened_with_symbol[number] = has_symbol
            else:
                if bonds + closures == len(bond_ends):
                    return -1, -1
                begin = 0 if opened_with_symbol[number] and not has_symbol else 1  # of the opening atom
                closure_ends[closures, begin], closure_ends[closures, 1 - begin] = opened_at[number], previous
                closure_ends[closures, 2 + begin] = opening_position[number]
                closure_ends[closures, 3 - begin] = position
                closure_number[closures] = number
                closures += 1
                opened_at[number] = -1
            has_symbol = False
        else:
            if atoms == len(parents):
                return -1, -1
            is_bracket[atoms] = char == _OPEN_BRACKET
            marks[atoms] = 0
            if char == _OPEN_BRACKET:
                while text[position] != _CLOSE_BRACKET:
                    marks[atoms] += text[position] == _AT
                    position += 1
                position += 1
            elif position < stop and (
                (char == _UPPER_C and text[position] == _LOWER_L) or (char == _UPPER_B and text[position] == _LOWER_R)
            ):
                position += 1
            parents[atoms] = previous
            if previous >= 0:
                if bonds + closures == len(bond_ends):
                    return -1, -1
                bond_ends[bonds, 0] = previous
                bond_ends[bonds, 1] = atoms
                written_at[bonds, 0] = written_at[bonds, 1] = position
                bonds += 1
            previous = atoms
            atoms += 1
            has_symbol = False
    _append_closures(bond_ends, written_at, bonds, closure_ends, closure_number, closures)
    return atoms, bonds + closures


@njit(cache=True)
def read_bonds(text: np.ndarray) -> tuple[int, np.ndarray]:
    """How many atoms a SMILES (uint8) has, and its bonds: int32 [m, 2]; -1 atoms where `read_layout` cannot tell."""
    size = len(text)
    bond_ends = np.empty((size, 2), dtype=np.int32)
    atoms, bonds = read_layout(
        text,
        np.int64(0),  # a literal would be compiled for
        size,
        np.empty(size, dtype=np.int32),
        np.empty(size, dtype=np.uint8),
        np.empty(size, dtype=np.uint8),
        bond_ends,
        np.empty((size, 2), dtype=np.int32),
    )
    return atoms, bond_ends[: max(bonds, 0)]


@njit(cache=True)
def _append_closures(
    bond_ends: np.ndarray,
    written_at: np.ndarray,
    bonds: int,
    closure_ends: np.ndarray,
    closure_number: np.ndarray,
    closures: int,
) -> None:
    """Put the closures after the first `bonds` rows of bond_ends and written_at, ascending by number, else in order."""
    for index in range(closures):
        # An insertion sort, cell by cell: sorts and copies of NumPy's take numba seconds to compile.
        place = index
        while place > 0 and closure_number[place - 1] > closure_number[index]:
            place -= 1
        number = closure_number[index]
        for row in range(index, place, -1):
            closure_number[row] = closure_number[row - 1]
            for side in range(2):
                bond_ends[bonds + row, side] = bond_ends[bonds + row - 1, side]
                written_at[bonds + row, side] = written_at[bonds + row - 1, side]
        closure_number[place] = number
        for side in range(2):
            bond_ends[bonds + place, side] = closure_ends[index, side]
            written_at[bonds + place, side] = closure_ends[index, 2 + side]
