"""The plan on drawn datasets, mixtures and budgets: it equals a slow reference that deals run by run."""

import json
from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hmoe_ds.config import DataConfig
from hmoe_ds.data.mixture import Mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.data.runs import RunStream

SEED = 5


class DrawnStore:
    """Shards of drawn molecules behind the interface of `ShardStore`."""

    def __init__(self, shards):
        self._shards = [
            SimpleNamespace(
                rows=len(shard),
                num_atoms=np.array([atoms for atoms, _ in shard], np.uint16),
                num_bonds=np.array([max(0, atoms - 1) for atoms, _ in shard], np.uint16),
                scaffold_key=np.array([key for _, key in shard], np.uint64),
            )
            for shard in shards
        ]
        self.path, self.num_shards = "drawn", len(shards)
        self.row_start = np.concatenate([[0], np.cumsum([len(shard) for shard in shards])]).astype(np.int64)
        atoms = np.concatenate([shard.num_atoms for shard in self._shards])
        self.max_atoms, self.max_bonds = int(atoms.max()), int(max(0, atoms.max() - 1))

    def __len__(self):
        return int(self.row_start[-1])

    def window(self, current, upcoming=()):
        self._current = set(current)

    def shard(self, index):
        assert index in self._current, "a shard outside of what was said to be needed"
        return self._shards[index]


molecule = st.tuples(st.integers(1, 12), st.integers(0, 3))  # atoms, scaffold
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


def runs_of(mixture, number, data, molecules):
    """The first runs of one dataset as lists of (row of the mixture, epoch, atoms, bonds)."""
    stream = RunStream(mixture.stores[number], data.window_shards, data.scaffold_run, SEED, number)
    ahead = stream.peek(molecules, 1 << 40, 1 << 40)
    rows = (ahead.rows_B + mixture.first_row_S[number]).tolist()
    columns = list(zip(rows, ahead.epoch_B.tolist(), ahead.num_atoms_B.tolist(), strict=True))
    runs, first = [], 0
    for size, bonds in zip(ahead.molecules_R.tolist(), ahead.bonds_R.tolist(), strict=True):
        runs.append((columns[first : first + size], bonds))
        first += size
    return runs


def slow_slices(mixture, data, accumulation, count):
    """Slices dealt run by run: always the dataset that is furthest behind, until its run no longer fits."""
    budgets = [getattr(data, f"{name}_per_step") // accumulation for name in ("molecules", "atoms", "bonds")]
    needed = (count + 1) * budgets[0]
    runs = [runs_of(mixture, number, data, needed) for number in range(len(mixture.stores))]
    dealt, position = [0] * len(runs), [0] * len(runs)
    for _ in range(count):
        part, used = [], [0, 0, 0]
        while True:
            number = min(range(len(runs)), key=lambda n: (dealt[n] / mixture.weight_S[n], n))
            molecules, bonds = runs[number][position[number]]
            size = [len(molecules), sum(atoms for _, _, atoms in molecules), bonds]
            if any(u + s > b for u, s, b in zip(used, size, budgets, strict=True)):
                break
            used = [u + s for u, s in zip(used, size, strict=True)]
            part += molecules
            dealt[number] += len(molecules)
            position[number] += 1
        yield part


def as_lists(part):
    return list(zip(part.rows_B.tolist(), part.epoch_B.tolist(), part.num_atoms_B.tolist(), strict=True))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(plans())
def test_drawn_plans_equal_the_slow_reference(drawn):
    make, mixture, data, accumulation = drawn
    plan = make()
    found = [as_lists(part) for _ in range(4) for part in plan.next_step()]
    assert all(found)
    assert found == list(slow_slices(mixture, data, accumulation, len(found)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(plans(), st.integers(0, 6))
def test_a_drawn_plan_goes_on_where_its_state_was_saved(drawn, steps):
    make, *_ = drawn
    plan, restored = make(), make()
    for _ in range(steps):
        plan.next_step()
    restored.load_state_dict(json.loads(json.dumps(plan.state_dict())))
    for _ in range(4):
        expected, found = plan.next_step(), restored.next_step()
        assert [as_lists(part) for part in expected] == [as_lists(part) for part in found]


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
