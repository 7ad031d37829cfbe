"""Invariant 1: the global plan depends on dataset, seed and step only; budgets hold; every molecule is dealt."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmoe_ds.config import ConfigError, DataConfig
from hmoe_ds.data.batch import gather, scaffold_keys
from hmoe_ds.data.fill import run_starts
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan, deal, sequential_slices

DATA = DataConfig(molecules_per_step=64, atoms_per_step=3000, bonds_per_step=3000, window_shards=2)


@pytest.fixture(scope="module")
def store(dataset):
    return open_mixture(DataConfig(path=str(dataset)), "train")


def steps(store, count, data=DATA, accumulation=1, seed=0):
    plan = BatchPlan(store, data, accumulation, seed)
    return [plan.next_step() for _ in range(count)]


def same(first, second):
    return all(
        np.array_equal(a, b)
        for step_a, step_b in zip(first, second, strict=True)
        for slice_a, slice_b in zip(step_a, step_b, strict=True)
        for a, b in zip(slice_a, slice_b, strict=True)
    )


def test_plan_is_a_function_of_the_seed(store):
    assert store.stores[0].num_shards > 2
    assert same(steps(store, 30), steps(store, 30))
    assert not same(steps(store, 30), steps(store, 30, seed=1))


def test_every_molecule_is_dealt_once_per_epoch(store):
    rows = np.concatenate([part.rows_B for step in steps(store, 60) for part in step])
    epochs = np.concatenate([part.epoch_B for step in steps(store, 60) for part in step])
    assert epochs.max() >= 2
    first_two = [np.sort(rows[epochs == epoch]) for epoch in (0, 1)]
    for dealt in first_two:
        assert np.array_equal(dealt, np.arange(len(store)))
    assert not np.array_equal(rows[epochs == 0], rows[epochs == 1])


@pytest.mark.parametrize("accumulation", [1, 4])
def test_budgets_hold_for_every_slice(store, accumulation):
    shards = [store.shard(index) for index in range(store.stores[0].num_shards)]
    atoms = np.concatenate([shard.num_atoms for shard in shards]).astype(int)
    bonds = np.concatenate([shard.num_bonds for shard in shards]).astype(int)
    data = replace(DATA, atoms_per_step=1800, bonds_per_step=1900)
    for step in steps(store, 40, data, accumulation):
        assert len(step) == accumulation
        for part in step:
            assert 0 < len(part.rows_B) <= data.molecules_per_step // accumulation
            assert atoms[part.rows_B].sum() <= data.atoms_per_step // accumulation
            assert bonds[part.rows_B].sum() <= data.bonds_per_step // accumulation
            assert np.array_equal(part.num_atoms_B, atoms[part.rows_B])


@pytest.mark.parametrize("binding", ["molecules_per_step", "atoms_per_step", "bonds_per_step"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_budget_that_binds_is_filled(store, binding, accumulation):
    """What is left over is less than the next run of one scaffold, of real molecules."""
    large, budget = 1 << 20, {"molecules_per_step": 150, "atoms_per_step": 3000, "bonds_per_step": 3000}[binding]
    others = {"molecules_per_step": large, "atoms_per_step": large, "bonds_per_step": large}
    data = replace(DATA, **others | {binding: budget * accumulation})
    dealt = [part for step in steps(store, 30, data, accumulation) for part in step]
    sizes = {
        "molecules_per_step": [len(part.rows_B) for part in dealt],
        "atoms_per_step": [part.num_atoms_B.sum() for part in dealt],
        "bonds_per_step": [gather(store, part.rows_B).num_bonds for part in dealt],
    }[binding]
    assert max(sizes) <= budget
    assert np.mean(sizes) >= 0.95 * budget


def test_same_scaffold_molecules_are_dealt_together(store):
    def share_with_partner(data):
        found = []
        for step in steps(store, 20, data):
            keys = scaffold_keys(store, step[0].rows_B)[0]
            counts = np.unique(keys[keys != 0], return_counts=True)[1]
            found.append(counts[counts > 1].sum() / len(keys))
        return np.mean(found)

    data = replace(DATA, molecules_per_step=16)
    assert share_with_partner(data) > 1.5 * share_with_partner(replace(data, scaffold_run=1)) > 0


def test_a_restored_cursor_continues_the_plan(store):
    plan = BatchPlan(store, DATA, 2, seed=3)
    for _ in range(17):
        plan.next_step()
    state = json.loads(json.dumps(plan.state_dict()))
    expected = [plan.next_step() for _ in range(20)]
    restored = BatchPlan(store, DATA, 2, seed=3)
    restored.load_state_dict(state)
    assert same(expected, [restored.next_step() for _ in range(20)])


def test_a_curriculum_begins_with_the_simplest_molecules_and_reaches_all(store):
    shards = [store.shard(index) for index in range(store.stores[0].num_shards)]
    complexity = np.concatenate([shard.complexity for shard in shards])
    plan = BatchPlan(store, DATA, 1, seed=0)
    at_first = [plan.next_step(0.2)[0] for _ in range(5)]
    while_growing = [plan.next_step(c)[0] for c in np.linspace(0.2, 1, 10)]
    in_the_end = [plan.next_step()[0] for _ in range(45)]
    fifth = np.sort(complexity)[int(np.ceil(0.2 * len(complexity))) - 1]
    assert max(complexity[part.rows_B].max() for part in at_first) == fifth < complexity.max()
    assert all(len(part.rows_B) > DATA.molecules_per_step - DATA.scaffold_run for part in at_first)
    # The last epoch that the growing competence reaches into, then one that deals everything.
    last = max(part.epoch_B.max() for part in while_growing)
    rows, epochs = (np.concatenate(column) for column in list(zip(*in_the_end, strict=True))[:2])
    assert np.array_equal(np.sort(rows[epochs == last + 1]), np.arange(len(store)))


def test_a_budget_no_run_can_meet_is_refused(store):
    with pytest.raises(ConfigError, match=r"data.atoms_per_step is 40.*at least"):
        BatchPlan(store, replace(DATA, atoms_per_step=40), 1, 0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 200), min_size=0, max_size=200), st.integers(1, 8))
def test_deal_gives_every_rank_its_share(num_atoms, ranks):
    atoms = np.array(num_atoms, np.int64)
    rank_B = deal(atoms, ranks)
    counts = np.bincount(rank_B, minlength=ranks)
    loads = np.bincount(rank_B, weights=atoms, minlength=ranks)
    assert len(counts) == ranks
    assert counts.max() - counts.min() <= 2
    # A bound that dealing there and back keeps whatever the sizes.
    assert loads.max() - loads.min() <= 2 * atoms.max(initial=0)


def test_run_starts_cut_at_scaffolds_and_length():
    keys = np.array([5, 5, 5, 5, 5, 7, 0, 0, 9, 9], np.uint64)
    assert run_starts(keys, 2).astype(int).tolist() == [1, 0, 1, 0, 1, 1, 1, 1, 1, 0]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=60), st.integers(1, 5))
def test_run_starts_match_a_slow_reference(keys, longest):
    expected, length = [], 0
    for i, key in enumerate(keys):
        new = i == 0 or key != keys[i - 1] or key == 0 or length == longest
        length = 1 if new else length + 1
        expected.append(new)
    assert run_starts(np.array(keys, np.uint64), longest).tolist() == expected


def test_sequential_slices_cover_the_split_in_order(store):
    slices = sequential_slices(store, DATA, molecules=500)
    assert np.array_equal(np.concatenate([part.rows_B for part in slices]), np.arange(500))
    assert all(part.num_atoms_B.sum() <= DATA.atoms_per_step for part in slices)
