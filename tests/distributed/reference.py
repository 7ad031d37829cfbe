"""What a run must compute, by other means: no ranks, no DeepSpeed, no packed losses.

One model in double precision, one batch, torch's AdamW, and losses written as their definitions say.
"""

import torch
import torch.nn.functional as F

from hmoe_ds.data.batch import gather
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.objectives.masking import draw_masks
from hmoe_ds.training.engine import learning_rate_ratio
from tests.distributed.routing_log import molecule_choices


def slow_contrast(u_BP, scaffold, generic, t):
    terms = []
    for m in range(len(scaffold)):
        positives = [n for n in range(len(scaffold)) if n != m and scaffold[n] == scaffold[m] and scaffold[m] != 0]
        negatives = [n for n in range(len(scaffold)) if generic[n] != generic[m]]
        if positives:
            similar = torch.exp(u_BP @ u_BP[m] / t)
            total = similar[positives + negatives].sum()
            terms.append(torch.stack([-torch.log(similar[n] / total) for n in positives]).mean())
    return torch.stack(terms) if terms else u_BP.new_zeros(0)


def mean(parts):
    """Mean over the entries of all parts; zero, with a gradient, where there are none."""
    entries = torch.cat(parts)
    return entries.sum() / max(1, len(entries))


def reference_losses(model, config, parts):
    """The step's loss from its slices `(batch, masks)`; -> loss, and the encoding of each slice."""
    atom, bond, contrast, z_scaffold, z_atom, encodings = [], [], [], [], [], []
    for batch, masks in parts:
        encoding = model(batch, masks)
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
        contrast.append(
            slow_contrast(
                encoding.scaffold.u_BP,
                batch.scaffold_key_B.tolist(),
                batch.generic_key_B.tolist(),
                config.objective.contrast_temperature,
            )
        )
        z_scaffold.append(encoding.scaffold.z_B)
        z_atom.append(torch.stack([routing.z_N for routing in encoding.atoms]).mean(dim=0))
    means = [mean(terms) for terms in (atom, bond, contrast, z_scaffold, z_atom)]
    objective = config.objective
    total = (
        means[0]
        + objective.bond_weight * means[1]
        + objective.contrast_weight * means[2]
        + objective.z_weight * (means[3] + means[4])
    )
    return total, encodings


def reference_run(config):
    """-> (loss and gradient norm of each step, {(step, slice, molecule): choices}, final weights)."""
    model = HMoEModel(config.model, config.router, config.run.seed).double()
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
    )
    store = open_mixture(config.data, "train")
    plan = BatchPlan(store, config.data, optim.accumulation, config.run.seed)
    history, choices = [], {}
    for step in range(config.run.steps):
        parts = []
        for whole in plan.next_step():
            batch = gather(store, whole.rows_B)
            parts.append((batch, draw_masks(batch, whole.epoch_B, config.objective.mask_ratio, config.run.seed)))
        loss, encodings = reference_losses(model, config, parts)
        for number, ((batch, _), encoding) in enumerate(zip(parts, encodings, strict=True)):
            choices |= {(step, number, key): chosen for key, chosen in molecule_choices(batch, encoding).items()}
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate * learning_rate_ratio(step, config.run.steps, optim)
        optimizer.step()
        with torch.no_grad():
            move_biases(model, config, [batch for batch, _ in parts], encodings)
        history.append((loss.item(), norm.item()))
    return history, choices, model.state_dict()


def move_biases(model, config, batches, encodings):
    router = config.router
    atoms_G = torch.zeros(router.groups)
    for batch, encoding in zip(batches, encodings, strict=True):
        for m, groups in enumerate(encoding.scaffold.groups_BC.tolist()):
            for g in groups:
                atoms_G[g] += float((batch.molecule_N == m).sum())
    move_bias(model.encoder.scaffold_gate.route_bias, atoms_G, router.group_balance_rate)
    for number, layer in enumerate(model.encoder.moe_layers()):
        atoms_E = torch.zeros(router.experts)
        for encoding in encodings:
            for e in range(router.experts):
                atoms_E[e] += float((encoding.atoms[number].choices_NK == e).sum())
        move_bias(layer.gate.route_bias, atoms_E, router.expert_balance_rate)


def move_bias(bias, load, rate):
    moved = bias + rate * torch.sign(load.mean() - load)
    bias.copy_(moved - moved.mean())
