"""Validation on scaffolds that training never sees, by all ranks together."""

from __future__ import annotations

import torch

from data_pipeline.schema import ATOM_FEATURE_SIZES
from hmoe_ds.config import RunConfig
from hmoe_ds.data.mixture import Mixture
from hmoe_ds.moe.agreement import consistency, mutual_information
from hmoe_ds.moe.balance import chosen_by_atoms, measure_load
from hmoe_ds.objectives.gather import gather_rows, sum_over_ranks
from hmoe_ds.objectives.molecule import count_targets
from hmoe_ds.objectives.total import Normalizers, PretrainingTask
from hmoe_ds.training.feed import validation_slices
from hmoe_ds.training.recording.metrics import group_entropy, load_imbalance, rms_ratio

_UNIT = Normalizers(*torch.ones(len(Normalizers._fields)).unbind())


@torch.no_grad()
def validate(task: PretrainingTask, mixture: Mixture, config: RunConfig, rank: int, ranks: int) -> dict[str, float]:
    """Losses and routing health of a model on the molecules of `mixture`, the validation split; {} when it is empty.

    Whatever the stage of a curriculum, they are of its end: all molecules, the final mask ratio and routing. So they
    compare over steps and runs, and are those of a model that is exported now.

    `validation_atom_entropy` is the entropy of the hidden atoms' elements: the loss of a model that knows
    nothing but how frequent each element is.
    """
    weights, device = config.objective.prediction_weights, next(task.parameters()).device
    task.eval()
    sums, routed = [], []
    for part in validation_slices(mixture, config.data, config.objective, rank, ranks):
        known = {"atom": int(part.masks.atom_N.sum()), "bond": int(part.masks.bond_M.sum())}
        known |= count_targets(part.batch)._asdict()
        counts = torch.tensor([known[name] for name in weights], dtype=torch.float64)
        elements = part.batch.atom_features_N9[part.masks.atom_N, 0].long()
        histogram = torch.bincount(elements, minlength=ATOM_FEATURE_SIZES[0]).double()
        part = part.to(device)
        losses, encoding = task(part, _UNIT)
        load = measure_load(encoding.scaffold, encoding.atoms, part.batch.molecule_N, config.router)
        terms = torch.stack([getattr(losses, name) for name in weights]).double()
        sums.append([terms, counts.to(device), histogram.to(device), *load])
        keys = part.batch.scaffold_key_B, part.batch.generic_key_B
        table_B3 = torch.stack([*keys, encoding.scaffold.groups_BC[:, 0]], dim=1)
        routed.append(gather_rows(table_B3, part.counts))
    task.train()
    if not sums:
        return {}
    totals = sum_over_ranks([torch.stack(entry).sum(dim=0) for entry in zip(*sums, strict=True)])
    terms, counts, histogram, molecules_G, _, atoms_LE, chosen_p, squares_L2 = totals
    scaffold_key, generic_key, group = torch.cat(routed).cpu().numpy().T
    atom_choices = chosen_by_atoms(atoms_LE, task.model.encoder.live_experts(), config.router)
    means = dict(zip(weights, (terms / counts).tolist(), strict=True))
    return {
        "validation_loss": sum(weight * means[name] for name, weight in weights.items()),
        **{f"validation_loss_{name}": mean for name, mean in means.items()},
        "validation_atom_entropy": torch.special.entr(histogram / histogram.sum()).sum().item(),
        "validation_consistency": consistency(scaffold_key, group),
        "validation_group_scaffold_nmi": mutual_information(generic_key, group),
        "validation_group_entropy": group_entropy(molecules_G),
        "validation_expert_load_max_over_mean": load_imbalance(*atom_choices),
        "validation_chosen_p": (chosen_p / molecules_G.sum()).item(),
        "validation_routed_over_dense_rms": rms_ratio(squares_L2),
        "validation_molecules": molecules_G.sum().item(),
    }
