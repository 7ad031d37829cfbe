"""Splits of labelled molecules into training, validation and test: by scaffold, at random, or as a column says.

A molecule, and with the scaffold splits a scaffold, is on one side only.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase
from rdkit.Chem.Scaffolds import MurckoScaffold

from data_pipeline.errors import UsageError

Rows = NDArray[np.int64]

SIDES = ("train", "validation", "test")
# How a column may call them.
_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "holdout"), "test"),
}


class Split(NamedTuple):
    """Rows of each side, ascending."""

    train: Rows
    validation: Rows
    test: Rows


def scaffold_split(smiles: Sequence[str], fractions: tuple[float, float] = (0.8, 0.1)) -> Split:
    """The deterministic scaffold split that MoleculeNet results are compared by.

    Molecules of one Murcko scaffold, chirality included, go to one side, those without rings together to one. The
    largest scaffolds come first, of equal ones the one whose first molecule comes last; they fill training, then
    validation, then test. The protocol of Hu et al., "Strategies for Pre-training Graph Neural Networks", 2020.

    Args:
        smiles: of the molecules; RDKit can read them.
        fractions: of molecules for training and validation; the rest is for the test.
    """
    groups = sorted(_groups(map(scaffold_with_chirality, smiles)), key=lambda rows: (len(rows), rows[0]), reverse=True)
    most_train, most_both = fractions[0] * len(smiles), sum(fractions) * len(smiles)
    train: list[int] = []
    validation: list[int] = []
    test: list[int] = []
    for rows in groups:
        if len(train) + len(rows) <= most_train:
            train += rows
        elif len(train) + len(validation) + len(rows) <= most_both:
            validation += rows
        else:
            test += rows
    return _split(train, validation, test)


def balanced_scaffold_split(smiles: Sequence[str], seed: int, fractions: tuple[float, float] = (0.8, 0.1)) -> Split:
    """Scaffolds in random order, so that all sides have large and small ones.

    Those with more molecules than half of validation or test can take come first, so they go to training. Molecules
    without rings have no scaffold, and each goes by itself.

    Args:
        smiles: of the molecules, canonical: equal ones are one molecule.
        seed: of the order.
        fractions: of molecules for training and validation; the rest is for the test.
    """
    groups = _groups(scaffold_with_chirality(text) or text for text in smiles)
    order = np.random.default_rng(seed).permutation(len(groups))
    smallest = min(fractions[1], 1 - sum(fractions)) * len(smiles)
    large = [groups[place] for place in order if len(groups[place]) > smallest / 2]
    return _fill([*large, *(groups[place] for place in order if len(groups[place]) <= smallest / 2)], fractions)


def random_split(molecules: Sequence[Hashable], seed: int, fractions: tuple[float, float] = (0.8, 0.1)) -> Split:
    """Molecules in random order; rows of the same molecule stay together.

    Args:
        molecules: identity of each row's molecule.
        seed: of the order.
        fractions: of molecules for training and validation; the rest is for the test.
    """
    groups = _groups(molecules)
    order = np.random.default_rng(seed).permutation(len(groups))
    return _fill([groups[place] for place in order], fractions)


def column_split(cells: Sequence[str], column: str, rows: Sequence[int], molecules: Sequence[Hashable]) -> Split:
    """As a column says: train, validation (or valid, val, dev) or test (or holdout); an empty cell means no side.

    Args:
        cells: of the molecules.
        column: its name, for messages.
        rows: of the molecules in the table, from 0.
        molecules: identity of each row's molecule.

    Raises:
        UsageError: a cell says something else, no row is for training or validation, or a molecule is on two sides.
    """
    sides: dict[str, list[int]] = {name: [] for name in SIDES}
    for place, (cell, row) in enumerate(zip(cells, rows, strict=True)):
        if not cell:
            continue
        if cell.lower() not in _NAMES:
            raise UsageError(
                f"column {column!r} has {cell[:40]!r} in row {row + 1}: expected train, validation, test or an empty "
                "cell"
            )
        sides[_NAMES[cell.lower()]].append(place)
    for name in ("train", "validation"):
        if not sides[name]:
            raise UsageError(f"column {column!r} has no row for {name}: expected train, validation and test in it")
    _check_apart(sides, column, rows, molecules)
    return _split(*sides.values())


def _check_apart(sides: dict[str, list[int]], column: str, rows: Sequence[int], molecules: Sequence[Hashable]) -> None:
    first: dict[Hashable, tuple[str, int]] = {}
    apart: dict[Hashable, str] = {}
    for side, places in sides.items():
        for place in places:
            before, row = first.setdefault(molecules[place], (side, rows[place]))
            if before != side:
                apart.setdefault(
                    molecules[place], f"row {row + 1} for {before} and in row {rows[place] + 1} for {side}"
                )
    if apart:
        raise UsageError(
            f"column {column!r} has {len(apart)} molecules on more than one side, such as that in "
            f"{next(iter(apart.values()))} (a salt and its base are one molecule): put each on one side, or empty its "
            "cells of the others"
        )


def scaffold_with_chirality(smiles: str) -> str:
    """SMILES of the Murcko scaffold with its stereo centres; "" for a molecule without rings."""
    with rdBase.BlockLogs():
        return MurckoScaffold.MurckoScaffoldSmiles(mol=Chem.MolFromSmiles(smiles), includeChirality=True)


def _groups(keys: Iterable[Hashable]) -> list[list[int]]:
    """The rows of each key, in the order of their first rows."""
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _fill(groups: Iterable[list[int]], fractions: tuple[float, float]) -> Split:
    """Groups in their order: each to the first side, of training, validation and test, that has room for it."""
    groups = list(groups)
    total = sum(map(len, groups))
    room = [fractions[0] * total, fractions[1] * total, float("inf")]
    sides: list[list[int]] = [[], [], []]
    for rows in groups:
        side = next(side for side in range(3) if len(sides[side]) + len(rows) <= room[side])
        sides[side] += rows
    return _split(*sides)


def _split(train: Sequence[int], validation: Sequence[int], test: Sequence[int]) -> Split:
    return Split(*(np.sort(np.array(rows, np.int64)) for rows in (train, validation, test)))
