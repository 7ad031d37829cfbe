"""Who goes where: every molecule to its group's rank, as far as the atoms of a rank are bounded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmoe_ds.moe.migration import assign


def loads(rank_B, atoms_B, ranks):
    return np.array([sum(a for a, r in zip(atoms_B, rank_B, strict=True) if r == rank) for rank in range(ranks)])


@given(st.integers(1, 5).flatmap(lambda ranks: st.tuples(st.just(ranks), st.lists(
    st.tuples(st.integers(0, ranks - 1), st.integers(0, ranks - 1), st.integers(1, 60)), min_size=1, max_size=60
))))  # fmt: skip
def test_no_rank_gets_more_than_its_budget_and_one_molecule(case):
    ranks, molecules = case
    home, wanted, atoms = np.array(molecules).T
    rank = assign(home, wanted, atoms, ranks, 1.05)
    assert ((rank >= 0) & (rank < ranks)).all()
    mean = atoms.sum() / ranks
    assert loads(rank, atoms, ranks).max() <= max(1.05 * mean, mean + atoms.max())
    wished = loads(wanted, atoms, ranks)
    if wished.max() <= 1.05 * mean:
        np.testing.assert_array_equal(rank, wanted)


def test_those_from_elsewhere_are_turned_away_first_the_largest_of_them():
    home, atoms = np.array([0, 0, 1, 1, 1]), np.array([10, 10, 8, 4, 6])
    # All want rank 0, where there is room for 20 of 38 atoms.
    np.testing.assert_array_equal(assign(home, np.zeros(5, int), atoms, 2, 1.06), [0, 0, 1, 1, 1])
    # With room for 24 the smallest of them comes along.
    np.testing.assert_array_equal(assign(home, np.zeros(5, int), atoms, 2, 24 / 19), [0, 0, 1, 0, 1])


def test_the_last_one_that_is_turned_away_is_no_larger_than_it_must_be():
    home, atoms = np.array([1, 1, 1, 1, 1, 0]), np.array([30, 25, 12, 9, 4, 20])
    # All want rank 0, where there is room for 60 of 100 atoms: 30 go home, and for 10 more 12 are enough.
    np.testing.assert_array_equal(assign(home, np.zeros(6, int), atoms, 2, 1.2), [1, 0, 1, 0, 0, 0])
    # With room for 80, 25 go, though the 20 that are at home there would do.
    np.testing.assert_array_equal(assign(home, np.zeros(6, int), atoms, 2, 1.6), [0, 1, 0, 0, 0, 0])


@pytest.mark.parametrize("ranks", [2, 8])
def test_real_sizes_stay_within_the_budget(ranks):
    generator = np.random.default_rng(ranks)
    atoms = generator.integers(8, 60, 64 * ranks)
    home = np.arange(len(atoms)) % ranks
    wanted = np.minimum(generator.geometric(0.3, len(atoms)) - 1, ranks - 1)  # a few groups are much too common
    rank = assign(home, wanted, atoms, ranks, 1.03)
    assert loads(rank, atoms, ranks).max() <= 1.05 * atoms.sum() / ranks
    assert (rank == wanted).mean() > 0.3
