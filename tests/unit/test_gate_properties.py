"""The gate on drawn sizes, down to no atoms at all: it equals the slow reference and keeps its promises."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmoe_ds.config import RouterConfig
from hmoe_ds.moe.gate import AtomGate, ScaffoldGate
from tests.unit.test_gate import D, assert_routed, reference_atom_level, reference_scaffold_level


@st.composite
def routers(draw):
    groups, per_group = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    groups_per_molecule = draw(st.integers(1, groups))
    blocks = draw(st.sampled_from([b for b in range(1, groups + 1) if groups % b == 0]))
    return RouterConfig(
        groups=groups,
        experts=groups * per_group,
        groups_per_molecule=groups_per_molecule,
        group_blocks=blocks,
        block_bonus=draw(st.sampled_from([0.0, 0.2])),
        experts_per_atom=draw(st.integers(1, groups_per_molecule * per_group)),
        gate_size=draw(st.integers(2, 6)),
        temperature=draw(st.sampled_from([0.05, 0.3, 2.0])),
    )


@st.composite
def cases(draw):
    """-> router, gates in fp64 with random biases, and molecules of 1 to 6 atoms, or none."""
    router, sizes = draw(routers()), draw(st.lists(st.integers(1, 6), max_size=5))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 2**31)))
        gates = ScaffoldGate(D, router).double(), AtomGate(D, router).double()
        for gate in gates:
            gate.route_bias.normal_(std=draw(st.sampled_from([0.0, 0.5])))
        molecule_N = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
        h_ND = torch.randn(len(molecule_N), D, dtype=torch.float64)
        mask_N = torch.rand(len(molecule_N)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return router, gates, h_ND, molecule_N, mask_N, len(sizes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_drawn_gates_match_the_reference(case):
    router, (scaffold_gate, atom_gate), h_ND, molecule_N, mask_N, count = case
    routing = scaffold_gate(h_ND, molecule_N, mask_N, count)
    atoms = atom_gate(h_ND, routing, molecule_N)
    expected = list(reference_scaffold_level(scaffold_gate, h_ND, molecule_N, mask_N, count, router))
    assert routing.groups_BC.shape == (count, router.groups_per_molecule)
    for m, (u, p, _, chosen, _) in enumerate(expected):
        torch.testing.assert_close(routing.u_BP[m], u)
        torch.testing.assert_close(routing.log_p_BG[m].exp(), torch.tensor(p, dtype=torch.float64))
        assert routing.groups_BC[m].tolist() == chosen
    for i, m in enumerate(molecule_N.tolist()):
        _, p, biased_p, chosen, _ = expected[m]
        pairs, _ = reference_atom_level(atom_gate, h_ND[i], p, biased_p, chosen, router)
        assert_routed(atoms, i, pairs, router)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_weights_are_shares_and_choices_are_distinct_and_inside_the_groups(case):
    router, (scaffold_gate, atom_gate), h_ND, molecule_N, mask_N, count = case
    routing = scaffold_gate(h_ND, molecule_N, mask_N, count)
    atoms = atom_gate(h_ND, routing, molecule_N)
    assert atoms.choices_NK.shape == atoms.weights_NK.shape == (len(h_ND), router.experts_per_atom)
    assert (atoms.weights_NK > 0).all()
    # Never renormalised: what is chosen has at most the probability of the chosen groups.
    mass_B = routing.log_p_BG.gather(1, routing.groups_BC).exp().sum(dim=1)
    assert (atoms.weights_NK.sum(dim=1) <= mass_B[molecule_N] + 1e-12).all()
    for i, m in enumerate(molecule_N.tolist()):
        experts = atoms.choices_NK[i].tolist()
        assert len(set(experts)) == len(experts)
        assert {e // (router.experts // router.groups) for e in experts} <= set(routing.groups_BC[m].tolist())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cases(), st.randoms(use_true_random=False))
def test_a_molecule_is_routed_alike_in_any_company(case, random):
    """Dropping and reordering the other molecules changes nothing for one of them."""
    _, (scaffold_gate, atom_gate), h_ND, molecule_N, mask_N, count = case
    routing = scaffold_gate(h_ND, molecule_N, mask_N, count)
    atoms = atom_gate(h_ND, routing, molecule_N)
    kept = random.sample(range(count), random.randint(0, count))
    rows = torch.cat([torch.empty(0, dtype=torch.long), *(torch.where(molecule_N == m)[0] for m in kept)])
    sizes = torch.tensor([int((molecule_N == m).sum()) for m in kept], dtype=torch.long)
    some_N = torch.arange(len(kept)).repeat_interleave(sizes)
    some = scaffold_gate(h_ND[rows], some_N, mask_N[rows], len(kept))
    some_atoms = atom_gate(h_ND[rows], some, some_N)
    assert torch.equal(some.groups_BC, routing.groups_BC[kept])
    assert torch.equal(some_atoms.choices_NK, atoms.choices_NK[rows])
    torch.testing.assert_close(some_atoms.weights_NK, atoms.weights_NK[rows])
