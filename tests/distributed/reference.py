"""What a run must compute, by other means: no ranks, no DeepSpeed, no packed losses.

One model in double precision, one batch, torch's AdamW, and losses written as their definitions say.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from hmoe_ds.data.batch import bare_scaffolds, gather
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.objectives.masking import draw_masks
from hmoe_ds.training.curriculum import Curriculum
from hmoe_ds.training.engine import learning_rate_ratio
from tests.distributed.routing_log import molecule_choices
from tests.slow_allocation import slow_decision, slow_family_balance


def slow_contrast(u_BP, scaffold, generic, t, view_BP=None):
    """`view_BP`: a view of each molecule, the positive of one that has no other."""
    terms = []
    for m in range(len(scaffold)):
        positives = [n for n in range(len(scaffold)) if n != m and scaffold[n] == scaffold[m] and scaffold[m] != 0]
        negatives = [n for n in range(len(scaffold)) if generic[n] != generic[m]]
        similar = torch.exp(u_BP @ u_BP[m] / t)
        if positives:
            total = similar[positives + negatives].sum()
            terms.append(torch.stack([-torch.log(similar[n] / total) for n in positives]).mean())
        elif view_BP is not None and scaffold[m] != 0:
            own = torch.exp(u_BP[m] @ view_BP[m] / t).squeeze()
            terms.append(-torch.log(own / (own + similar[negatives].sum())))
    return torch.stack(terms) if terms else u_BP.new_zeros(0)


def compared(routing, objective):
    return routing.u_BP if objective.contrast_of == "embedding" else routing.log_p_BG.exp().sqrt()


def slow_balance(encodings, config):
    """Sum over slices of the product of what was chosen there and the weights there, as shares of the whole step."""
    router = config.router
    molecules = sum(len(encoding.scaffold.u_BP) for encoding in encodings)
    atoms = sum(len(encoding.h_ND) for encoding in encodings)
    total = 0.0
    for encoding in encodings:
        top = encoding.scaffold.groups_BC[:, 0]
        for g in range(router.groups):
            share = (top == g).double().mean()
            total = total + router.groups * share * encoding.scaffold.log_p_BG[:, g].exp().sum() / molecules
        for routing in encoding.atoms:
            used = routing.choices_NK[routing.choices_NK < router.experts]
            for e in range(router.experts):
                weight = routing.candidates.log_w_NM.exp()[routing.candidates.expert_NM == e].sum()
                share = (used == e).double().mean()
                total = total + router.experts * share * weight / atoms / len(encoding.atoms)
    return total


def slow_fingerprint(logits_BV, fingerprint_BV):
    """Divergence of each molecule that has a fingerprint, bin by bin."""
    terms = []
    for logits_V, counts_V in zip(logits_BV, fingerprint_BV.double(), strict=True):
        bins = counts_V.nonzero().flatten()
        if len(bins):
            share = counts_V[bins] / counts_V.sum()
            p = torch.exp(logits_V - logits_V.max())
            terms.append((share * torch.log(share * p.sum() / p[bins])).sum())
    return torch.stack(terms) if terms else logits_BV.new_zeros(0)


def slow_descriptors(predicted_BT, descriptors_BT, mean_T, deviation_T):
    """Huber's loss of each descriptor that is known."""
    known = ~descriptors_BT.isnan()
    error = predicted_BT[known] - ((descriptors_BT.double() - mean_T) / deviation_T)[known]
    return torch.where(error.abs() < 1, error.square() / 2, error.abs() - 0.5)


def slow_readouts(readout, h_ND, batch):
    found = []
    for m in range(batch.num_molecules):
        own = h_ND[batch.molecule_N == m]
        size = own.new_tensor([math.log(len(own) / 32)])
        found.append(own.mean(dim=0) if readout == "mean" else torch.cat([own.mean(dim=0), own.amax(dim=0), size]))
    return torch.stack(found)


def descriptor_scale(store):
    """Mean and standard deviation over all molecules of one dataset; 1 where they are all the same."""
    values = gather(store, np.arange(len(store))).targets.descriptors_BT.double().numpy()
    deviation = np.nanstd(values, axis=0)
    return torch.from_numpy(np.nanmean(values, axis=0)), torch.from_numpy(np.where(deviation > 0, deviation, 1))


def mean(parts):
    """Mean over the entries of all parts; zero, with a gradient, where there are none."""
    entries = torch.cat(parts)
    return entries.sum() / max(1, len(entries))


def reference_losses(model, config, parts, stage, temperature):
    """The step's loss from its slices `(batch, masks)`; -> loss, and the encoding of each slice."""
    atom, bond, contrast, z_scaffold, z_atom, entropy, fingerprint, descriptors, encodings = ([] for _ in range(9))
    for batch, masks in parts:
        encoding = model(batch, masks, stage.routing)
        encodings.append(encoding)
        h = encoding.h_ND
        atom.append(
            F.cross_entropy(
                model.atom_head(h)[masks.atom_N],
                batch.atom_features_N9[masks.atom_N, 0].long(),
                reduction="none",
            )
        )
        begin, end = batch.edge_index_2M[:, ::2]
        logits = model.bond_head(h[begin], h[end])
        bond.append(
            F.cross_entropy(logits[masks.bond_M], batch.bond_features_M3[masks.bond_M, 0].long(), reduction="none")
        )
        view = None
        if config.objective.contrast_bare_scaffold:
            cyclic = batch.scaffold_key_B != 0
            seen = compared(model.encoder.route(bare_scaffolds(batch, cyclic), stage=stage.routing), config.objective)
            view = seen.new_zeros(len(cyclic), seen.shape[1]).index_put((cyclic.nonzero().squeeze(1),), seen)
        contrast.append(
            slow_contrast(
                compared(encoding.scaffold, config.objective),
                batch.scaffold_key_B.tolist(),
                batch.generic_key_B.tolist(),
                temperature,
                view,
            )
        )
        for routing in encoding.atoms:
            share = routing.candidates.log_w_NM.softmax(dim=1)
            entropy.append(-(share * share.clamp(min=1e-300).log()).sum(dim=1))  # 0 log 0 is 0
        if model.fingerprint_head is not None:
            logits = model.fingerprint_head(slow_readouts(config.objective.readout, h, batch))
            fingerprint.append(slow_fingerprint(logits, batch.targets.fingerprint_BV))
        if model.descriptor_head is not None:
            head = model.descriptor_head
            predicted = head(slow_readouts(config.objective.readout, h, batch), batch.ptr_B.diff())
            descriptors.append(slow_descriptors(predicted, batch.targets.descriptors_BT, head.mean_T, head.deviation_T))
        z_scaffold.append(encoding.scaffold.z_B)
        z_atom.append(torch.stack([routing.z_N for routing in encoding.atoms]).mean(dim=0))
    means = [mean(terms) for terms in (atom, bond, contrast, z_scaffold, z_atom, entropy)]
    objective = config.objective
    total = (
        means[0]
        + objective.bond_weight * means[1]
        + objective.contrast_weight * means[2]
        + objective.z_weight * (means[3] + means[4])
        + objective.entropy_weight * means[5]
        + objective.balance_weight * slow_balance(encodings, config)
    )
    if fingerprint:
        total = total + objective.fingerprint_weight * mean(fingerprint)
    if descriptors:
        total = total + objective.descriptor_weight * mean(descriptors)
    return total, encodings


def reference_run(config):
    """-> (loss, norm and contrast temperature of each step, {(step, slice, molecule): choices}, final weights)."""
    heads = config.objective.molecule_heads
    model = HMoEModel(config.model, config.router, config.run.seed, heads=heads).double()
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    log_temperature = torch.tensor([config.objective.contrast_temperature]).log().double()
    log_temperature.requires_grad_(config.objective.contrast_learned_temperature)
    learned = [log_temperature] if config.objective.contrast_learned_temperature else []
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1] + learned
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
    )
    store = open_mixture(config.data, "train", targets=config.objective.needs_targets)
    if heads.descriptors:
        model.descriptor_head.mean_T, model.descriptor_head.deviation_T = descriptor_scale(store)
    plan = BatchPlan(store, config.data, optim.accumulation, config.run.seed)
    history, choices = [], {}
    for step in range(config.run.steps):
        parts, stage = [], Curriculum(config).stage(step)
        for whole in plan.next_step(stage.competence):
            batch = gather(store, whole.rows_B)
            parts.append((batch, draw_masks(batch, whole.epoch_B, stage.mask_ratio, config.run.seed)))
        loss, encodings = reference_losses(model, config, parts, stage, log_temperature.exp())
        for number, ((batch, _), encoding) in enumerate(zip(parts, encodings, strict=True)):
            choices |= {(step, number, key): chosen for key, chosen in molecule_choices(batch, encoding).items()}
        optimizer.zero_grad()
        loss.backward()
        temperature = log_temperature.exp().item()
        norm = torch.nn.utils.clip_grad_norm_([*model.parameters(), *learned], optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate * learning_rate_ratio(step, config.run.steps, optim)
        optimizer.step()
        with torch.no_grad():
            loads = move_biases(model, config, [batch for batch, _ in parts], encodings)
            if config.router.experts_at_start:
                slow_decision(model, optimizer, loads, config, step + 1)
        history.append((loss.item(), norm.item(), temperature))
    return history, choices, model.state_dict()


def move_biases(model, config, batches, encodings):
    """-> the load of each expert of each layer."""
    router = config.router
    atoms_G = torch.zeros(router.groups)
    for batch, encoding in zip(batches, encodings, strict=True):
        if router.form == "soft":  # its molecules choose no groups
            for g in range(router.groups):
                chosen = [routing.choices_NK * router.groups // router.experts == g for routing in encoding.atoms]
                atoms_G[g] += float(sum(c.sum() for c in chosen))
            continue
        for m, groups in enumerate(encoding.scaffold.groups_BC.tolist()):
            for g in groups:
                atoms_G[g] += float((batch.molecule_N == m).sum())
    move_bias(model.encoder.scaffold_gate.route_bias, atoms_G, router.group_balance_rate)
    loads = []
    for number, layer in enumerate(model.encoder.moe_layers()):
        atoms_E = torch.zeros(router.experts)
        for encoding in encodings:
            for e in range(router.experts):
                atoms_E[e] += float((encoding.atoms[number].choices_NK == e).sum())
        loads.append(atoms_E.tolist())
        if router.experts_at_start:
            slow_family_balance(layer.gate, atoms_E.tolist(), router, router.expert_balance_rate)
        else:
            for pool in pools(router):
                bias = layer.gate.route_bias[pool]
                move_bias(bias, atoms_E[pool], router.expert_balance_rate)
                layer.gate.route_bias[pool] = bias
    return loads


def pools(router):
    """Experts that compete for the same atoms, pool by pool."""
    size = router.experts // router.groups
    groups = [list(range(group * size, (group + 1) * size)) for group in range(router.groups)]
    match router.form:
        case "hard":
            return groups
        case "additive":
            return [[expert for group in groups for expert in group[1:]]]
        case _:
            return [[expert for group in groups for expert in group]]


def move_bias(bias, load, rate):
    moved = bias + rate * torch.sign(load.mean() - load)
    bias.copy_(moved - moved.mean())
