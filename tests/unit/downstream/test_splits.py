"""Splits: the deterministic one against an independent implementation on real sets; nothing on two sides."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem, RDConfig
from rdkit.Chem.Scaffolds import MurckoScaffold

from data_pipeline.errors import UsageError
from hmoe_ds.downstream.splits import (
    balanced_scaffold_split,
    column_split,
    random_split,
    scaffold_split,
    scaffold_with_chirality,
)

SHARED = Path(__file__).parents[4] / "shared" / "data" / "moleculenet"


def nci(count: int) -> list[str]:
    lines = (Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi").read_text().splitlines()
    readable = (line.split()[0] for line in lines)
    return [smiles for smiles in readable if Chem.MolFromSmiles(smiles) is not None][:count]


def hu_split(smiles):
    """As `splitters.py` of Hu et al. does it, written from its description."""
    scaffolds = defaultdict(list)
    for row, text in enumerate(smiles):
        mol = Chem.MolFromSmiles(text)
        core = MurckoScaffold.GetScaffoldForMol(mol)
        scaffolds[Chem.MolToSmiles(core, isomericSmiles=True)].append(row)
    ordered = sorted(scaffolds.values(), key=lambda rows: (-len(rows), -rows[0]))
    train, validation, test = [], [], []
    for rows in ordered:
        if len(train) + len(rows) > 0.8 * len(smiles):
            if len(train) + len(validation) + len(rows) > 0.9 * len(smiles):
                test.extend(rows)
            else:
                validation.extend(rows)
        else:
            train.extend(rows)
    return [sorted(rows) for rows in (train, validation, test)]


def sets_of_molecules():
    yield pytest.param(nci(1500), id="nci")
    for name in ("bbbp", "bace", "esol"):
        path = SHARED / f"{name}.csv"
        if path.exists():
            texts = [line.split(",")[0] for line in path.read_text().splitlines()[1:]]
            yield pytest.param([text for text in texts if Chem.MolFromSmiles(text) is not None], id=name)


@pytest.mark.parametrize("smiles", sets_of_molecules())
def test_the_scaffold_split_is_that_of_the_protocol(smiles):
    split = scaffold_split(smiles)
    assert [rows.tolist() for rows in split] == hu_split(smiles)
    sides = [{scaffold_with_chirality(smiles[row]) for row in rows} for rows in split]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert len(split.train) == pytest.approx(0.8 * len(smiles), rel=0.02)


def test_chirality_makes_another_scaffold():
    one, other = "C[C@H]1CCCN1", "C[C@@H]1CCCN1"
    assert scaffold_with_chirality(one) == scaffold_with_chirality(other) == "C1CCNC1"
    decalins = ["O[C@H]1CCC[C@@H]2CCCC[C@H]12", "O[C@H]1CCC[C@H]2CCCC[C@H]12"]
    assert len({scaffold_with_chirality(text) for text in decalins}) == 2


@pytest.mark.parametrize("seed", [0, 1])
def test_a_balanced_split_spreads_scaffolds_and_parts_none(seed):
    smiles = nci(1500)
    split = balanced_scaffold_split(smiles, seed)
    assert sorted(np.concatenate(split).tolist()) == list(range(1500))
    sides = [{scaffold_with_chirality(smiles[row]) for row in rows} - {""} for rows in split]
    assert not (sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2])
    assert len(split.train) == pytest.approx(1200, rel=0.02)
    assert len(split.test) == pytest.approx(150, rel=0.2)
    again = balanced_scaffold_split(smiles, seed)
    assert all(np.array_equal(one, other) for one, other in zip(split, again, strict=True))
    # Single scaffolds are on all sides, where the deterministic split has them in test only.
    assert any(not scaffold_with_chirality(smiles[row]) for row in split.train)
    assert any(not scaffold_with_chirality(smiles[row]) for row in split.test)


@pytest.mark.parametrize("seed", range(10))
def test_a_molecule_without_rings_is_on_one_side_only(seed):
    smiles = ["CCO"] * 10 + [f"{'C' * length}O" for length in range(3, 43)] * 2
    split = balanced_scaffold_split(smiles, seed)
    sides = [{smiles[row] for row in rows} for rows in split]
    assert not (sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2])


def test_seeds_give_different_splits():
    smiles = nci(300)
    assert balanced_scaffold_split(smiles, 0).test.tolist() != balanced_scaffold_split(smiles, 1).test.tolist()
    keys = list(range(300))
    assert random_split(keys, 0).test.tolist() != random_split(keys, 1).test.tolist()


def test_a_random_split_keeps_rows_of_a_molecule_together():
    keys = [number // 3 for number in range(300)]
    split = random_split(keys, seed=3)
    sides = [{keys[row] for row in rows} for rows in split]
    assert sum(map(len, sides)) == 100
    assert [len(rows) for rows in split] == [240, 30, 30]


def test_a_column_says_it():
    split = column_split(["Train", "valid", "", "test", "training", "holdout", "val"], "side", range(7), "abcdaeb")
    assert [rows.tolist() for rows in split] == [[0, 4], [1, 6], [3, 5]]
    with pytest.raises(UsageError, match="column 'side' has 'both' in row 8: expected train, validation, test or an"):
        column_split(["train", "both"], "side", [5, 7], "ab")
    with pytest.raises(UsageError, match="column 'side' has no row for validation"):
        column_split(["train", "test"], "side", [0, 1], "ab")


def test_a_molecule_that_a_column_puts_on_two_sides():
    sides = ["train", "test", "train", "val", "test", "val"]
    with pytest.raises(UsageError, match="has 2 molecules on more than one side, such as that in row 3 for train and"):
        column_split(sides, "side", range(6), ["ethanol", "ethanol", "benzene", "benzene", "benzene", "other"])
