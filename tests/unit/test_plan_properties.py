"""The plan on drawn datasets, mixtures, budgets and curricula: it equals a slow reference that deals run by run."""

import json
import math
from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hmoe_ds.config import DataConfig
from hmoe_ds.data.mixture import Mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.data.runs import RunStream

SEED = 5


def bonds_of(atoms):
    return max(0, atoms - 1)


def bound(store, competence):
    """The smallest complexity that this share of the molecules, in whole percent, does not exceed."""
    return store.by_complexity[max(1, math.ceil(round(competence * 100) / 100 * len(store))) - 1]


class DrawnStore:
    """Shards of drawn molecules behind the interface of `ShardStore`."""

    def __init__(self, shards):
        self._shards = [
            SimpleNamespace(
                rows=len(shard),
                num_atoms=np.array([atoms for atoms, _, _ in shard], np.uint16),
                num_bonds=np.array([bonds_of(atoms) for atoms, _, _ in shard], np.uint16),
                scaffold_key=np.array([key for _, key, _ in shard], np.uint64),
                complexity=np.array([complexity for _, _, complexity in shard], np.float32),
            )
            for shard in shards
        ]
        self.path, self.num_shards = "drawn", len(shards)
        self.row_start = np.concatenate([[0], np.cumsum([len(shard) for shard in shards])]).astype(np.int64)
        atoms = np.concatenate([shard.num_atoms for shard in self._shards])
        self.max_atoms, self.max_bonds = int(atoms.max()), bonds_of(int(atoms.max()))
        self.complexity = [complexity for shard in shards for _, _, complexity in shard]
        self.by_complexity = sorted(self.complexity)
        self.complexity_percentiles = [bound(self, percent / 100) for percent in range(101)]

    def __len__(self):
        return int(self.row_start[-1])

    def window(self, current, upcoming=()):
        self._current = set(current)

    def shard(self, index):
        assert index in self._current, "a shard outside of what was said to be needed"
        return self._shards[index]


molecule = st.tuples(st.integers(1, 12), st.integers(0, 3), st.sampled_from([1.0, 2.0, 3.5, 9.0]))  # ..., complexity
shard = st.lists(molecule, max_size=12)
store = st.lists(shard, min_size=1, max_size=4).filter(any).map(DrawnStore)


@st.composite
def plans(draw):
    """-> a function that makes the plan anew, its mixture, its settings and its accumulation."""
    stores = draw(st.lists(store, min_size=1, max_size=3))
    weights = draw(
        st.one_of(
            st.none(),
            st.lists(st.sampled_from([0.05, 1.0, 2.5]), min_size=len(stores), max_size=len(stores)),
        )
    )
    accumulation, run = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    data = DataConfig(
        molecules_per_step=accumulation * run * draw(st.integers(1, 8)),
        atoms_per_step=accumulation * run * draw(st.integers(12, 60)),
        bonds_per_step=accumulation * run * draw(st.integers(12, 60)),
        scaffold_run=run,
        window_shards=draw(st.integers(1, 3)),
    )
    mixture = Mixture(stores, weights)
    return (lambda: BatchPlan(mixture, data, accumulation, SEED)), mixture, data, accumulation


def runs_of(mixture, number, data):
    """The endless runs of one dataset, each a list of (row of the mixture, epoch, atoms)."""
    stream = RunStream(mixture.stores[number], data.window_shards, data.scaffold_run, SEED, number)
    while True:
        stream.forget()
        window, cursor = stream.window(), stream.cursor
        run = slice(*window.before_R3[cursor.run : cursor.run + 2, 0])
        rows = (window.rows_B[run] + mixture.first_row_S[number]).tolist()
        yield [(row, cursor.epoch, atoms) for row, atoms in zip(rows, window.num_atoms_B[run].tolist(), strict=True)]
        stream.advance(1, len(rows))


def slow_slices(mixture, data, accumulation, competences):
    """Slices dealt run by run: always the dataset that is furthest behind, until its run no longer fits.

    What the step's competence does not admit is left out of a run when its turn comes.
    """
    budgets = [getattr(data, f"{name}_per_step") // accumulation for name in ("molecules", "atoms", "bonds")]
    streams = [runs_of(mixture, number, data) for number in range(len(mixture.stores))]
    runs, dealt = [next(stream) for stream in streams], [0] * len(streams)
    complexity = [value for store in mixture.stores for value in store.complexity]
    for competence in np.repeat(competences, accumulation).tolist():
        bounds = [bound(store, competence) for store in mixture.stores]
        part, used = [], [0, 0, 0]
        while True:
            number = min(range(len(runs)), key=lambda n: (dealt[n] / mixture.weight_S[n], n))
            molecules = [entry for entry in runs[number] if complexity[entry[0]] <= bounds[number]]
            size = [len(molecules), *(sum(f(atoms) for _, _, atoms in molecules) for f in (int, bonds_of))]
            if any(u + s > b for u, s, b in zip(used, size, budgets, strict=True)):
                break
            used = [u + s for u, s in zip(used, size, strict=True)]
            part += molecules
            dealt[number] += len(molecules)
            runs[number] = next(streams[number])
        yield part


def as_lists(part):
    return list(zip(part.rows_B.tolist(), part.epoch_B.tolist(), part.num_atoms_B.tolist(), strict=True))


rising = st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4).map(sorted)
competences = st.one_of(st.just([1.0] * 4), rising)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(plans(), competences)
def test_drawn_plans_equal_the_slow_reference(drawn, competences):
    make, mixture, data, accumulation = drawn
    plan = make()
    found = [as_lists(part) for competence in competences for part in plan.next_step(competence)]
    assert all(found)
    assert found == list(slow_slices(mixture, data, accumulation, competences))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(plans(), competences)
def test_a_drawn_plan_goes_on_where_its_state_was_saved(drawn, competences):
    make, mixture, *_ = drawn
    plan, states, expected = make(), [], []
    for competence in competences:
        states.append(json.loads(json.dumps(plan.state_dict())))
        expected.append([as_lists(part) for part in plan.next_step(competence)])
    began_with = [store.complexity_percentiles for store in mixture.stores]
    try:
        for store in mixture.stores:
            store.complexity_percentiles = [9.0] * 101  # as if hard molecules had been appended
        for step, state in enumerate(states):
            restored = make()
            restored.load_state_dict(state)
            found = [[as_lists(part) for part in restored.next_step(c)] for c in competences[step:]]
            assert found == expected[step:]
    finally:
        for store, percentiles in zip(mixture.stores, began_with, strict=True):
            store.complexity_percentiles = percentiles


@settings(max_examples=40, deadline=None, derandomize=True)
@given(plans(), rising)
def test_an_epoch_deals_what_is_admitted_once_and_in_the_end_everything(drawn, competences):
    make, mixture, *_ = drawn
    plan, epochs = make(), {}
    for competence in competences + [1.0] * 6:
        for part in plan.next_step(competence):
            number_B = np.searchsorted(mixture.first_row_S, part.rows_B, side="right") - 1
            local_B = part.rows_B - mixture.first_row_S[number_B]
            for number, epoch, row in zip(number_B.tolist(), part.epoch_B.tolist(), local_B.tolist(), strict=True):
                assert mixture.stores[number].complexity[row] <= bound(mixture.stores[number], competence)
                epochs.setdefault((number, epoch), []).append((row, competence))
    for (number, epoch), dealt in epochs.items():
        rows, store = [row for row, _ in dealt], mixture.stores[number]
        assert len(set(rows)) == len(rows)
        if epoch and (number, epoch + 1) in epochs:
            before = epochs[number, epoch - 1][-1][1]  # the competence when the epoch before it ended
            assert set(rows) >= {row for row in range(len(store)) if store.complexity[row] <= bound(store, before)}
            assert before < 1 or sorted(rows) == list(range(len(store)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(plans())
def test_shares_follow_the_weights_and_epochs_are_whole(drawn):
    make, mixture, data, _ = drawn
    plan = make()
    parts = [part for _ in range(12) for part in plan.next_step()]
    rows, epochs = (np.concatenate(column) for column in list(zip(*parts, strict=True))[:2])
    number = np.searchsorted(mixture.first_row_S, rows, side="right") - 1
    dealt = np.bincount(number, minlength=len(mixture.stores))
    # Nobody is further from his share than a run of each dataset.
    assert np.all(np.abs(dealt - mixture.weight_S * len(rows)) <= data.scaffold_run * len(mixture.stores))
    for n, part in enumerate(mixture.stores):
        mine, epoch = rows[number == n] - mixture.first_row_S[n], epochs[number == n]
        for finished in range(epoch.max(initial=0)):
            assert np.array_equal(np.sort(mine[epoch == finished]), np.arange(len(part)))
