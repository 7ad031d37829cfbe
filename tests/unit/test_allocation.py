"""Dynamic expert allocation: what a split changes and what not, who splits, how families share their atoms."""

import dataclasses
import random

import pytest
import torch

from hmoe_ds.config import ModelConfig, RouterConfig
from hmoe_ds.data.batch import gather
from hmoe_ds.data.store import ShardStore
from hmoe_ds.model.encoder import Encoding
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.moe.allocation import apply_split, plan_split, split_direction
from hmoe_ds.moe.balance import update_family_bias
from hmoe_ds.moe.experts import LocalExecutor
from hmoe_ds.moe.gate import AtomGate, RoutingStage, ScaffoldGate
from hmoe_ds.moe.layer import HMoELayer
from hmoe_ds.moe.slots import ExpertSlots, pool_of
from hmoe_ds.objectives.router_losses import choice_entropy, router_balance_loss
from tests import slow_allocation as slow

D = 16
FORMS = ["hard", "soft", "flat", "additive"]
ROUTER = RouterConfig(
    groups=2, experts=16, experts_at_start=6, groups_per_molecule=1, experts_per_atom=2, gate_size=8,
    expert_size=12, shared_size=0, split_every=1,
)  # fmt: skip


def make(form, seed=0, **changes):
    """-> router, scaffold gate, layer, atoms."""
    router = dataclasses.replace(ROUTER, form=form, **changes)
    torch.manual_seed(seed)
    gate = ScaffoldGate(D, router).double()
    layer = HMoELayer(D, router, seed=seed, layer=1, executor=LocalExecutor).double()
    layer.gate.route_bias.copy_(torch.randn(router.experts).double() * 0.1 * layer.gate.slots.root_E)
    molecule_N = torch.arange(20).repeat_interleave(9)
    x_ND = torch.randn(180, D, dtype=torch.float64) + 0.5 * torch.randn(D, dtype=torch.float64)
    return router, gate, layer, (x_ND, gate(x_ND, molecule_N, torch.ones(180).bool(), 20), molecule_N)


def split_once(layer, router, load_E, step):
    """Let one expert split, if one can."""
    layer.gate.slots.load_E.copy_(load_E)
    split = plan_split(layer.gate.slots, router)
    if split is not None:
        for weight in layer.executor.experts.parameters():
            weight.data[split.slot] = weight.data[split.parent]
        apply_split(layer.gate, split, split_direction(0, 1, split.slot, step, router))
    return split


def count(atoms, router):
    return torch.bincount(atoms.choices_NK.flatten(), minlength=router.experts + 1)[: router.experts].double()


def drawn_load(layer, seed):
    """A load in which all that lives is alive."""
    return (1 + torch.rand(16, generator=torch.Generator().manual_seed(seed))) * layer.gate.slots.live_E


def grow(layer, router, inputs, splits):
    """Let experts split, and thresholds move in between."""
    for step in range(splits):
        assert split_once(layer, router, drawn_load(layer, step), step) is not None
        for _ in range(20):
            load_E = count(layer(*inputs)[1], router)
            update_family_bias(layer.gate.route_bias, layer.gate.slots, load_E, 0.01)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("top_p", "atom_share"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.0), (0.5, 0.4)])
def test_splits_change_no_output_and_no_weight(form, top_p, atom_share):
    k = 3 if form == "additive" else 2
    router, _, layer, inputs = make(form, top_p=top_p, experts_per_atom=k, reclaim_load=0.0)
    inputs = *inputs, RoutingStage(atom_share)
    y_ND, before = layer(*inputs)
    for step in range(30):
        split_once(layer, router, drawn_load(layer, step), step)
        after_ND, after = layer(*inputs)
        torch.testing.assert_close(after_ND, y_ND, rtol=0, atol=1e-12)
        assert torch.equal(after.weights_NK, before.weights_NK)
    slots = layer.gate.slots
    assert slots.live_E.all()
    assert slots.generation_E.max() > 1
    parent = slots.parent_E.tolist()
    found = [[e if e == 16 else slow.root_of(e, parent) for e in row] for row in after.choices_NK.tolist()]
    assert found == before.choices_NK.tolist()
    assert all(len(set(row) - {16}) == len([e for e in row if e != 16]) for row in found)
    assert not torch.equal(after.choices_NK, before.choices_NK)
    assert all(pool_of(slot, router) == pool_of(of, router) for slot, of in enumerate(parent))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_atoms_descend_as_in_the_tree(form):
    router, _, layer, inputs = make(form)
    grow(layer, router, inputs, splits=9)
    gate, (x_ND, routing, molecule_N) = layer.gate, inputs
    key_NP, chosen_NK = gate.project(x_ND), gate(x_ND, routing, molecule_N).choices_NK
    roots_NK = torch.tensor(
        [[slow.root_of(e, gate.slots.parent_E.tolist()) for e in row] for row in chosen_NK.tolist()]
    )
    expected = [
        [slow.slow_slot(e, key_P, gate.slots) for e in row]
        for row, key_P in zip(roots_NK.tolist(), key_NP, strict=True)
    ]
    assert chosen_NK.tolist() == expected
    unused_NK = torch.full((180, 1), router.experts)
    assert torch.equal(gate.slots.descend(unused_NK, key_NP), unused_NK)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("atom_share", [1.0, 0.0])
def test_free_slots_do_not_exist_for_the_gate(form, atom_share):
    """A gate with free slots is the gate that has only the others: choices, weights and gradients."""
    router, _, layer, (x_ND, routing, molecule_N) = make(form)
    small = dataclasses.replace(router, experts=6, experts_at_start=0)
    kept = [0, 1, 2, 8, 9, 10]
    gate, fewer = layer.gate, AtomGate(D, small).double()
    fewer.project.load_state_dict(gate.project.state_dict())
    fewer.keys.data, fewer.route_bias.data = gate.keys.data[kept].clone(), gate.route_bias[kept].clone()
    found, expected = (one(x_ND, routing, molecule_N, RoutingStage(atom_share)) for one in (gate, fewer))
    assert torch.equal(found.choices_NK, torch.tensor(kept)[expected.choices_NK])
    torch.testing.assert_close(found.weights_NK, expected.weights_NK)
    for atoms, one in ((found, gate), (expected, fewer)):
        entropy = choice_entropy(Encoding(None, None, None, routing, (atoms,)), 1)
        (atoms.weights_NK.square().sum() + atoms.z_N.sum() + entropy).backward(retain_graph=True)
        assert torch.isfinite(one.keys.grad).all()
    torch.testing.assert_close(gate.keys.grad[kept], fewer.keys.grad)
    assert not gate.keys.grad[~gate.slots.live_E].any()


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_both_sides_of_every_split_come_to_have_atoms(form):
    router, _, layer, inputs = make(form)
    # Far from the origin nearly all states are on one side of a plane through it.
    inputs = inputs[0] + 2, *inputs[1:]
    for step in range(5):
        assert split_once(layer, router, drawn_load(layer, step), step) is not None
    slots = layer.gate.slots
    early = count(layer(*inputs)[1], router)
    loads = []
    for _ in range(400):
        load_E = count(layer(*inputs)[1], router)
        update_family_bias(layer.gate.route_bias, slots, load_E, 0.005)
        loads.append(load_E)
    late = torch.stack(loads[-100:]).mean(dim=0)
    new = (slots.generation_E > 0).nonzero().flatten().tolist()
    assert len(new) == 5
    assert min(early[new]) < 3, "an even start would show nothing"
    for child in new:
        one, other = (slow.mean_load(side, late) for side in slow.sides(child, *slow.tree(slots)))
        assert 1 / 3 < one / other < 3
    # A family that split takes more than one that did not.
    sizes = [len(slow.descendants(e, *slow.tree(slots))) for e in range(16)]
    roots = [e for e in slots.root_E.nonzero().flatten().tolist() if pool_of(e, router) is not None]
    load = {e: sum(late[slow.descendants(e, *slow.tree(slots))]) for e in roots}
    if form in ("soft", "flat"):
        large, small = max(roots, key=lambda e: sizes[e]), min(roots, key=lambda e: sizes[e])
        assert load[large] > load[small]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_biases_and_thresholds_move_as_the_tree_says(form):
    router, _, layer, inputs = make(form)
    grow(layer, router, inputs, splits=8)
    other = HMoELayer(D, router, seed=0, layer=1, executor=LocalExecutor).double()
    other.load_state_dict(layer.state_dict())
    for seed in range(5):
        load_E = torch.randint(0, 40, (16,), generator=torch.Generator().manual_seed(seed)).double()
        load_E *= layer.gate.slots.live_E
        update_family_bias(layer.gate.route_bias, layer.gate.slots, load_E, 0.3)
        slow.slow_family_balance(other.gate, load_E.tolist(), router, 0.3)
        torch.testing.assert_close(layer.gate.route_bias, other.gate.route_bias)
        torch.testing.assert_close(layer.gate.slots.threshold_E, other.gate.slots.threshold_E)
    assert not layer.gate.route_bias[~layer.gate.slots.root_E].any()


def state(router, load, parent=None, generation=None):
    slots = ExpertSlots(router)
    slots.load_E.copy_(torch.tensor(load))
    if parent is not None:
        slots.parent_E.copy_(torch.tensor(parent))
        slots.generation_E.copy_(torch.tensor(generation))
    return slots


SMALL = RouterConfig(groups=2, experts=8, experts_at_start=4, experts_per_atom=1, gate_size=4)  # slots 0, 1 and 4, 5


def test_who_splits_into_which_slot():
    def plan(load, parent=None, generation=None, **changes):
        router = dataclasses.replace(SMALL, **changes)
        split = plan_split(state(router, load, parent, generation), router)
        return split and (split.parent, split.slot, split.generation, split.reclaimed)

    start = [3.0, 9.0, 0.0, 0.0, 9.0, 1.0, 0.0, 0.0]
    assert plan(start) == (1, 2, 1, False)  # of two that are as hot the first, into the first free slot of its group
    assert plan(start, form="flat") == (1, 2, 1, False)
    assert plan(start, split_load=2.0) is None
    one_free = [0, 1, 0, 1, 4, 5, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]
    one_free[0][6] = one_free[0][7] = -1
    # Its own group is full and nobody dead; the next hottest is in the other group.
    assert plan([3, 9, 2, 2, 8, 1, 0, 0], *one_free) == (4, 6, 1, False)
    assert plan([3, 9, 2, 2, 8, 1, 0, 0], *one_free, form="flat") == (1, 6, 2, False)
    full = [0, 1, 0, 1, 4, 5, 4, 6], [0, 0, 1, 1, 0, 0, 1, 2]
    assert plan([3, 9, 2, 0, 1, 1, 2, 2], *full) == (1, 3, 1, True)  # its own dead copy: it splits anew
    assert plan([3, 9, 0, 2, 1, 1, 2, 2], *full) == (1, 2, 2, True)  # a dead one that was split from another
    assert plan([1, 9, 0, 2, 1, 1, 2, 2], *full, split_generations=1) is None
    assert plan([3, 9, 2, 2, 1, 1, 2, 2], *full) is None
    assert plan([0, 9, 2, 2, 1, 1, 2, 2], *full) is None  # a dead root whose family lives on
    alone = [0, 1, 1, 2, 4, 5, 4, 6], [0, 0, 1, 2, 0, 0, 1, 2]
    assert plan([0, 9, 2, 2, 1, 1, 2, 2], *alone) == (1, 0, 2, True)  # a dead family
    # The same, but its group would be left with one family for two choices.
    assert plan([0, 9, 2, 2, 1, 1, 2, 2], *alone, experts_per_atom=2) is None


@pytest.mark.parametrize("form", FORMS)
def test_decisions_are_those_of_the_slow_reference(form):
    """Long random histories of loads, some of them zero: splits, reclaimed slots, reclaimed families."""
    draw, kinds = random.Random(0), []
    for seed in range(12):
        k = draw.choice([2, 3]) if form == "additive" else draw.choice([1, 2])
        router = dataclasses.replace(
            ROUTER, form=form, experts_per_atom=k, split_load=draw.choice([1.0, 1.5]), reclaim_load=0.3,
            split_generations=draw.choice([2, 4]),
        )  # fmt: skip
        gate = AtomGate(D, router)
        for step in range(40):
            live = gate.slots.live_E.tolist()
            load = [float(draw.choice([0, 1, 2, 5, 9, 30])) * alive for alive in live]
            gate.slots.load_E.copy_(torch.tensor(load))
            split = plan_split(gate.slots, router)
            expected = slow.slow_plan(load, *slow.tree(gate.slots), router)
            assert (split and (split.parent, split.slot, split.generation)) == expected
            if split is not None:
                kinds.append((split.reclaimed, gate.slots.root_E[split.slot].item()))
                assert (split.parent_load, split.slot_load) == (load[split.parent], load[split.slot])
                apply_split(gate, split, split_direction(seed, 1, split.slot, step, router))
    assert {(False, False), (True, False), (True, True)} == set(kinds)


def test_directions_differ_by_all_that_they_are_of():
    first = split_direction(0, 1, 5, 100, ROUTER)
    assert torch.equal(first, split_direction(0, 1, 5, 100, ROUTER))
    assert first.norm().item() == pytest.approx(1)
    for other in [(1, 1, 5, 100), (0, 2, 5, 100), (0, 1, 6, 100), (0, 1, 5, 200)]:
        assert not torch.equal(first, split_direction(*other, ROUTER))


@pytest.fixture
def batch(dataset):
    return gather(ShardStore(dataset, "train"), torch.arange(40).numpy())


def grown_model(form):
    router = dataclasses.replace(ROUTER, form=form, shared_size=8)
    model = HMoEModel(ModelConfig(hidden_size=D, dense_size=16), router, seed=1).double().eval()
    for layer in model.encoder.moe_layers():
        for step in range(6):
            assert split_once(layer, router, drawn_load(layer, step), step) is not None
    return router, model


@pytest.mark.parametrize("form", FORMS)
def test_the_balance_loss_is_of_families_by_their_slots(form, batch):
    router, model = grown_model(form)
    encoding = model(batch)
    slots = [layer.gate.slots for layer in model.encoder.moe_layers()]
    p, top = encoding.scaffold.log_p_BG.exp(), encoding.scaffold.groups_BC[:, 0]
    expected = sum(2 * (top == g).double().mean() * p[:, g].mean() for g in range(2))
    for routing, layer_slots in zip(encoding.atoms, slots, strict=True):
        parent, generation = slow.tree(layer_slots)
        for root in layer_slots.root_E.nonzero().flatten().tolist():
            family = slow.descendants(root, parent, generation)
            share = torch.isin(routing.choices_NK, torch.tensor(family)).double().mean()
            weight = routing.candidates.log_w_NM.exp()[routing.candidates.expert_NM == root].sum() / batch.num_atoms
            expected = expected + 12 * share / len(family) * weight / len(slots)
    loss = router_balance_loss(encoding, batch.molecule_N, router, slots, 40, batch.num_atoms)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert all(torch.isfinite(layer.gate.keys.grad).all() for layer in model.encoder.moe_layers())


def test_an_exported_model_keeps_its_splits(tmp_path, batch):
    _, model = grown_model("flat")
    model.save_pretrained(tmp_path)
    loaded = HMoEModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.embed(batch), model.embed(batch))
    chosen = torch.cat([routing.choices_NK for routing in loaded.encoder(batch).atoms]).unique()
    born = torch.cat([layer.gate.slots.generation_E for layer in loaded.encoder.moe_layers()])
    assert born.max() > 0
    assert len(chosen) > 6
    assert loaded.encoder.live_experts().tolist() == [12] * len(model.encoder.moe_layers())


def test_without_allocation_nothing_is_kept():
    model = HMoEModel(ModelConfig(hidden_size=D), dataclasses.replace(ROUTER, experts_at_start=0))
    assert model.encoder.live_experts() is None
    assert not [name for name in model.state_dict() if "slots" in name]
