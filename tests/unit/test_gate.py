"""The hierarchical gate against a slow, obvious reference: loops over molecules, atoms, groups and experts."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hmoe_ds.config import RouterConfig
from hmoe_ds.moe.forms import ScaffoldRouting, groups_at_random
from hmoe_ds.moe.gate import AtomGate, RoutingStage, ScaffoldGate

D, G, E = 12, 4, 8


def make_router(**changes):
    values = {"groups": G, "experts": E, "experts_per_atom": 2, "gate_size": 6, "temperature": 0.3} | changes
    return RouterConfig(**values)


def molecules(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [5, 1, 7, 3]
    molecule_N = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    h_ND = torch.randn(sum(sizes), D, generator=generator, dtype=torch.float64)
    mask_N = torch.rand(sum(sizes), generator=generator) < 0.6
    mask_N[molecule_N == 1] = False  # acyclic
    return h_ND, molecule_N, mask_N, len(sizes)


def reference_scaffold_level(gate, h_ND, molecule_N, mask_N, molecules_B, router):
    """-> for each molecule: u, p over groups, the same with biases, chosen groups, squared log-partition."""
    for m in range(molecules_B):
        atoms = [i for i in range(len(h_ND)) if molecule_N[i] == m]
        scaffold = [i for i in atoms if mask_N[i]] or atoms
        z = sum(h_ND[i] for i in scaffold) / len(scaffold)
        hidden = F.silu(gate.hidden(gate.norm(z)))
        u = gate.project(hidden)
        u = u / u.norm()
        cosine = [torch.dot(u, gate.centers[g] / gate.centers[g].norm()).detach() for g in range(router.groups)]
        weights = [math.exp(c.item() / router.temperature) for c in cosine]
        p = [w / sum(weights) for w in weights]
        biased = [float(c) + float(gate.route_bias[g]) for g, c in enumerate(cosine)]
        first = max(range(router.groups), key=lambda g: biased[g])
        size = router.groups // router.group_blocks
        liked = [b + router.block_bonus * (g // size == first // size) for g, b in enumerate(biased)]
        chosen = sorted(range(router.groups), key=lambda g: -liked[g])[: router.groups_per_molecule]
        with_bias = [math.exp(b / router.temperature) for b in biased]
        yield u, p, [w / sum(with_bias) for w in with_bias], chosen, math.log(sum(weights)) ** 2


def reference_atom_level(gate, x_D, p, biased_p, chosen, router):
    """-> [(expert, weight)] of one atom, and its squared log-partition."""
    per_group = router.experts // router.groups
    t = [torch.dot(gate.project(x_D), gate.keys[e]).item() for e in range(router.experts)]
    every = range(router.experts)
    taken = []
    if router.form == "hard":
        w = {}
        for g in chosen:
            members = range(g * per_group, (g + 1) * per_group)
            total = sum(math.exp(t[e]) for e in members)
            w |= {e: p[g] * math.exp(t[e]) / total for e in members}
        score = w
    elif router.form == "soft":
        w = {e: math.exp(t[e]) * p[e // per_group] ** router.guidance for e in every}
        score = {e: math.exp(t[e]) * biased_p[e // per_group] ** router.guidance for e in every}
    elif router.form == "flat":
        w = score = {e: math.exp(t[e]) for e in every}
    else:
        taken = [(g * per_group, p[g]) for g in chosen]
        w = score = {e: math.exp(t[e]) for e in every if e % per_group}
    if router.form != "hard":
        w = {e: value / sum(w.values()) for e, value in w.items()}
    ranked = sorted(w, key=lambda e: -(math.log(score[e]) + float(gate.route_bias[e])))
    held = 0.0
    for e in ranked[: router.experts_per_atom - len(taken)]:
        if router.top_p < 1 and held >= router.top_p * sum(w.values()):
            break
        taken.append((e, w[e]))
        held += w[e]
    return taken, math.log(sum(math.exp(value) for value in t)) ** 2


def assert_routed(atoms, i, expected, router):
    """Atom i chose the expected (expert, weight) pairs; what is left of its choices is unused."""
    pairs = zip(atoms.choices_NK[i].tolist(), atoms.weights_NK[i].tolist(), strict=True)
    used = [(e, w) for e, w in pairs if e < router.experts]
    assert [e for e, _ in used] == [e for e, _ in expected]
    assert [w for _, w in used] == pytest.approx([w for _, w in expected])
    unused = atoms.weights_NK[i][atoms.choices_NK[i] == router.experts]
    assert len(unused) == router.experts_per_atom - len(expected)
    assert not unused.any()


@pytest.mark.parametrize("groups_per_molecule", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", ["hard", "soft", "flat", "additive"])
@pytest.mark.parametrize("top_p", [1.0, 0.4])
def test_both_levels_match_the_reference(groups_per_molecule, biased, form, top_p):
    torch.manual_seed(1)
    k = groups_per_molecule + 2 if form == "additive" else 2
    router = make_router(groups_per_molecule=groups_per_molecule, form=form, top_p=top_p, experts_per_atom=k)
    scaffold_gate, atom_gate = ScaffoldGate(D, router).double(), AtomGate(D, router).double()
    if biased:
        scaffold_gate.route_bias.normal_(std=0.5)
        atom_gate.route_bias.normal_(std=0.5)
    h_ND, molecule_N, mask_N, count = molecules()
    x_ND = torch.randn_like(h_ND)

    routing = scaffold_gate(h_ND, molecule_N, mask_N, count)
    atoms = atom_gate(x_ND, routing, molecule_N)

    expected = list(reference_scaffold_level(scaffold_gate, h_ND, molecule_N, mask_N, count, router))
    for m, (u, p, _, chosen, z) in enumerate(expected):
        torch.testing.assert_close(routing.u_BP[m], u)
        torch.testing.assert_close(routing.log_p_BG[m].exp(), torch.tensor(p, dtype=torch.float64))
        assert routing.groups_BC[m].tolist() == chosen
        assert routing.z_B[m].item() == pytest.approx(z)
    for i, m in enumerate(molecule_N.tolist()):
        _, p, biased_p, chosen, _ = expected[m]
        pairs, z = reference_atom_level(atom_gate, x_ND[i], p, biased_p, chosen, router)
        assert atoms.z_N[i].item() == pytest.approx(z)
        assert_routed(atoms, i, pairs, router)


@pytest.mark.parametrize("bonus", [0.1, 0.4, 3.0])
def test_a_bonus_prefers_groups_of_the_first_ones_block(bonus):
    torch.manual_seed(3)
    router = make_router(groups_per_molecule=3, groups=12, experts=24, group_blocks=3, block_bonus=bonus)
    gate = ScaffoldGate(D, router).double()
    gate.route_bias.normal_(std=0.3)
    plain = ScaffoldGate(D, replace(router, group_blocks=1, block_bonus=0.0)).double()
    plain.load_state_dict(gate.state_dict())
    z_BD = torch.randn(200, D, dtype=torch.float64)
    routing, without = gate.route(z_BD), plain.route(z_BD)
    # What is chosen changes, but not the first one, and no weight.
    assert torch.equal(routing.groups_BC[:, 0], without.groups_BC[:, 0])
    for name in ("u_BP", "log_p_BG", "biased_BG", "z_B"):
        assert torch.equal(getattr(routing, name), getattr(without, name))
    biased_BG = (routing.u_BP @ F.normalize(gate.centers, dim=1).t() + gate.route_bias).tolist()
    for chosen, biased in zip(routing.groups_BC.tolist(), biased_BG, strict=True):
        liked = [b + bonus * (g // 4 == chosen[0] // 4) for g, b in enumerate(biased)]
        assert chosen == sorted(range(12), key=lambda g: -liked[g])[:3]
    inside, inside_without = (
        (r.groups_BC // 4 == r.groups_BC[:, :1] // 4).double().mean().item() for r in (routing, without)
    )
    assert inside > inside_without + 0.05
    if bonus > 2:  # more than what two cosines and biases differ by
        assert inside == 1


def test_a_curriculum_of_the_temperature_leaves_what_the_bonus_does():
    torch.manual_seed(3)
    router = make_router(groups_per_molecule=2, groups=8, group_blocks=2, block_bonus=0.3)
    gate, z_BD = ScaffoldGate(D, router).double(), torch.randn(200, D, dtype=torch.float64)
    hot = gate.route(z_BD, RoutingStage(temperature=5.0))
    assert torch.equal(hot.groups_BC, gate.route(z_BD).groups_BC)


@pytest.mark.parametrize("form", ["hard", "soft", "flat", "additive"])
@pytest.mark.parametrize("top_p", [1.0, 0.4])
@pytest.mark.parametrize("atom_share", [0.0, 0.4, 1.0])
def test_a_curriculum_fades_the_atom_level_into_the_weights_alone(form, top_p, atom_share):
    torch.manual_seed(2)
    router = make_router(form=form, top_p=top_p, groups_per_molecule=2, experts_per_atom=4)
    scaffold_gate, atom_gate = ScaffoldGate(D, router).double(), AtomGate(D, router).double()
    h_ND, molecule_N, mask_N, count = molecules()
    routing = scaffold_gate(h_ND, molecule_N, mask_N, count)
    final = atom_gate(h_ND, routing, molecule_N)
    atoms = atom_gate(h_ND, routing, molecule_N, RoutingStage(atom_share))
    assert torch.equal(atoms.choices_NK, final.choices_NK)
    assert torch.equal(atoms.z_N, final.z_N)
    assert torch.equal(atoms.weights_NK, final.weights_NK) == (atom_share == 1)
    atoms.weights_NK.sum().backward()
    assert bool(atom_gate.keys.grad.any()) == (atom_share > 0)

    levels = list(reference_scaffold_level(scaffold_gate, h_ND, molecule_N, mask_N, count, router))
    # A gate with faded keys, which gives weights to all that can be chosen.
    faded_gate, all_of_them = AtomGate(D, router).double(), replace(router, experts_per_atom=router.experts, top_p=1.0)
    faded_gate.load_state_dict(atom_gate.state_dict())
    faded_gate.keys.data *= atom_share
    for i, m in enumerate(molecule_N.tolist()):
        _, p, biased_p, chosen, _ = levels[m]
        pairs, _ = reference_atom_level(atom_gate, h_ND[i], p, biased_p, chosen, router)
        faded = dict(reference_atom_level(faded_gate, h_ND[i], p, biased_p, chosen, all_of_them)[0])
        assert_routed(atoms, i, [(e, faded[e]) for e, _ in pairs], router)
        if form == "hard" and atom_share == 0:
            assert all(faded[e] == pytest.approx(p[e // 2] / 2) for e, _ in pairs)


def test_a_curriculum_anneals_the_temperature():
    hot, cold = (ScaffoldGate(D, make_router(temperature=temperature)).double() for temperature in (0.9, 0.3))
    hot.load_state_dict(cold.state_dict())
    atoms = molecules()
    for one, other in zip(cold(*atoms, RoutingStage(temperature=0.9)), hot(*atoms), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(cold(*atoms).groups_BC, hot(*atoms).groups_BC)
    assert not torch.equal(cold(*atoms).log_p_BG, hot(*atoms).log_p_BG)


@pytest.mark.parametrize(("guidance", "other"), [(0.3, {"guidance": 0.3}), (0.0, {"form": "flat"})])
def test_a_curriculum_anneals_the_guidance(guidance, other):
    torch.manual_seed(2)
    router = make_router(form="soft", groups_per_molecule=2, experts_per_atom=4)
    scaffold_gate, atom_gate = ScaffoldGate(D, router).double(), AtomGate(D, router).double()
    h_ND, molecule_N, mask_N, count = molecules()
    routing = scaffold_gate(h_ND, molecule_N, mask_N, count)
    expected_gate = AtomGate(D, replace(router, **other)).double()
    expected_gate.load_state_dict(atom_gate.state_dict())
    expected = expected_gate(h_ND, routing, molecule_N)
    atoms = atom_gate(h_ND, routing, molecule_N, RoutingStage(guidance=guidance))
    assert torch.equal(atoms.choices_NK, expected.choices_NK)
    torch.testing.assert_close(atoms.weights_NK, expected.weights_NK)
    assert not torch.equal(atom_gate(h_ND, routing, molecule_N).weights_NK, expected.weights_NK)


def test_bias_changes_choices_but_never_weights():
    torch.manual_seed(0)
    router = make_router(groups_per_molecule=1)
    gate = ScaffoldGate(D, router).double()
    h_ND, molecule_N, mask_N, count = molecules()
    before = gate(h_ND, molecule_N, mask_N, count)
    gate.route_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 5.0]))
    after = gate(h_ND, molecule_N, mask_N, count)
    assert after.groups_BC.unique().tolist() == [3]
    assert before.groups_BC.unique().tolist() != [3]
    torch.testing.assert_close(before.log_p_BG, after.log_p_BG)


def test_group_centres_receive_gradient_with_one_group_per_molecule():
    torch.manual_seed(0)
    router = make_router(groups_per_molecule=1)
    scaffold_gate, atom_gate = ScaffoldGate(D, router), AtomGate(D, router)
    h_ND, molecule_N, mask_N, count = molecules()
    routing = scaffold_gate(h_ND.float(), molecule_N, mask_N, count)
    atom_gate(h_ND.float(), routing, molecule_N).weights_NK.sum().backward()
    assert scaffold_gate.centers.grad.abs().max() > 1e-6


def test_a_bf16_model_routes_with_fp32_precision():
    torch.manual_seed(0)
    router = make_router()
    scaffold_gate, atom_gate = ScaffoldGate(D, router).bfloat16(), AtomGate(D, router).bfloat16()
    h_ND, molecule_N, mask_N, count = molecules()
    narrow_ND = h_ND.bfloat16()
    routing = scaffold_gate(narrow_ND, molecule_N, mask_N, count)
    atoms = atom_gate(narrow_ND, routing, molecule_N)
    # The same weights and states, which bf16 holds exactly, computed in fp64.
    exact = scaffold_gate.double()(narrow_ND.double(), molecule_N, mask_N, count)
    exact_atoms = atom_gate.double()(narrow_ND.double(), exact, molecule_N)
    assert routing.log_p_BG.dtype == atoms.weights_NK.dtype == torch.float32
    torch.testing.assert_close(routing.log_p_BG.double(), exact.log_p_BG, rtol=1e-5, atol=1e-5)
    assert torch.equal(atoms.choices_NK, exact_atoms.choices_NK)
    torch.testing.assert_close(atoms.weights_NK.double(), exact_atoms.weights_NK, rtol=1e-5, atol=1e-6)


def test_choices_stay_inside_the_chosen_groups():
    router = make_router(groups_per_molecule=2, experts_per_atom=4)
    gate = AtomGate(D, router)
    molecule_N = torch.arange(40) % 10
    routing = ScaffoldRouting(
        u_BP=torch.empty(10, 6),
        log_p_BG=torch.randn(10, G).log_softmax(dim=-1),
        groups_BC=torch.stack([torch.randperm(G)[:2] for _ in range(10)]),
        biased_BG=torch.empty(10, G),
        z_B=torch.empty(10),
        readout_BD=torch.empty(10, D),
    )
    atoms = gate(torch.randn(40, D), routing, molecule_N)
    group_NK = atoms.choices_NK // (E // G)
    allowed_NC = routing.groups_BC[molecule_N]
    assert (group_NK.unsqueeze(-1) == allowed_NC.unsqueeze(1)).any(-1).all()
    assert all(len(set(row)) == 4 for row in atoms.choices_NK.tolist())


def test_groups_at_random_follow_the_scaffold_alone():
    router = make_router(groups_per_molecule=2, group_choice="random")
    torch.manual_seed(0)
    gate = ScaffoldGate(D, router)
    key_B = torch.randint(-(2**62), 2**62, (4000,))
    key_B[1::2] = key_B[::2]
    routing = groups_at_random(gate.route(torch.randn(4000, D)), key_B, router)
    assert torch.equal(routing.groups_BC[1::2], routing.groups_BC[::2])
    assert (routing.groups_BC[:, 0] != routing.groups_BC[:, 1]).all()
    counts = torch.bincount(routing.groups_BC[:, 0], minlength=G)
    assert counts.min() > 0.8 * 4000 / G
    p_BG = routing.log_p_BG.exp()
    torch.testing.assert_close(p_BG.gather(1, routing.groups_BC), torch.full((4000, 2), 0.5))
    torch.testing.assert_close(p_BG.sum(dim=1), torch.ones(4000))
