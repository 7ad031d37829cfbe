"""Balance biases: what competes for the same atoms comes to have the same load, whatever the form of the router."""

from dataclasses import replace

import pytest
import torch

from hmoe_ds.config import RouterConfig
from hmoe_ds.moe.balance import chosen_by_atoms, update_expert_bias, update_route_bias
from hmoe_ds.moe.gate import AtomGate, ScaffoldGate
from hmoe_ds.training.recording.metrics import load_imbalance

GROUPS, D = 4, 16


@torch.no_grad()
def balanced_load(form: str, steps: int) -> torch.Tensor:
    """Atoms of each expert in the last hundred steps of gates that nothing but biases changes, [G, E / G]."""
    router = RouterConfig(
        groups=GROUPS, experts=16, form=form, experts_per_atom=2, gate_size=8, expert_balance_rate=0.02
    )
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    scaffold_gate, atom_gate = ScaffoldGate(D, router), AtomGate(D, router)
    tilt_D = 0.7 * torch.randn(D, generator=generator)
    molecule_N = torch.arange(64).repeat_interleave(8)
    total_E = torch.zeros(16)
    for step in range(steps):
        routing = scaffold_gate.route(torch.randn(64, D, generator=generator) + tilt_D)
        atoms = atom_gate(torch.randn(len(molecule_N), D, generator=generator) + tilt_D, routing, molecule_N)
        load_E = atoms.choices_NK.flatten().bincount(minlength=16).double()
        update_expert_bias(atom_gate.route_bias, load_E, router)
        total_E += load_E * (step >= steps - 100)
    return total_E.view(GROUPS, -1)


def test_experts_that_atoms_choose_in_the_additive_form():
    """Beside them the scaffolds' experts have loads of another kind."""
    pool = balanced_load("additive", 800)[:, 1:]
    assert pool.min() > 0.9 * pool.mean()
    assert pool.max() < 1.1 * pool.mean()


def test_experts_of_a_group_that_has_more_atoms_than_others():
    load_GJ = balanced_load("hard", 800)
    assert load_GJ.sum(dim=1).max() > 1.3 * load_GJ.sum(dim=1).mean()  # groups are not balanced here
    full_GJ = load_GJ[load_GJ.sum(dim=1) > 0.2 * load_GJ.sum(dim=1).mean()]
    assert (full_GJ / full_GJ.mean(dim=1, keepdim=True) - 1).abs().max() < 0.15


def test_loads_told_of_the_additive_form_are_those_that_atoms_choose():
    """Beside a load per atom of its molecule's expert any other looks small."""
    load_GJ = balanced_load("additive", 800)
    router = RouterConfig(groups=GROUPS, experts=load_GJ.numel(), form="additive")
    atoms_LE = load_GJ.flatten().unsqueeze(0)
    pool_LM, live_L = chosen_by_atoms(atoms_LE, torch.tensor([load_GJ.numel()]), router)
    assert load_imbalance(pool_LM, live_L) == load_imbalance(pool_LM) < 1.1
    assert load_imbalance(atoms_LE) > 1.3
    for form in ("hard", "soft", "flat"):
        all_LE, _ = chosen_by_atoms(atoms_LE, None, replace(router, form=form))
        assert torch.equal(all_LE, atoms_LE)


@pytest.mark.parametrize("form", ["soft", "flat"])
def test_experts_that_all_atoms_choose_from(form):
    bias, same = torch.zeros(16), torch.zeros(16)
    router = RouterConfig(groups=GROUPS, experts=16, form=form)
    load_E = torch.arange(16.0).double()
    update_expert_bias(bias, load_E, router)
    update_route_bias(same, load_E, router.expert_balance_rate)
    assert torch.equal(bias, same)
    assert bias[0] > bias[15]
    assert bias.sum().item() == pytest.approx(0, abs=1e-6)
