"""The pretraining loss: masked prediction, molecule-level targets, scaffold routing contrast, router z-loss; their sum.

Every term is normalised by a count over the whole optimizer step (all slices, all ranks), known before the
first backward. So the loss, its gradient and its clip norm do not depend on how the step is spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hmoe_ds.config import ObjectiveConfig
from hmoe_ds.config_checks import LEAST_LEARNED_TEMPERATURE
from hmoe_ds.data.batch import Masks, MolBatch, to_device
from hmoe_ds.model.encoder import Encoding
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.moe.forms import ScaffoldRouting
from hmoe_ds.moe.gate import FINAL_STAGE, RoutingStage
from hmoe_ds.objectives.contrast import count_anchors, scaffold_contrast_loss
from hmoe_ds.objectives.gather import gather_rows
from hmoe_ds.objectives.masking import (
    Hidden,
    hidden_rows,
    hidden_states,
    masked_atom_loss,
    masked_bond_loss,
)
from hmoe_ds.objectives.molecule import count_targets, molecule_losses
from hmoe_ds.objectives.router_losses import choice_entropy, router_balance_loss, router_z_loss


@dataclass(frozen=True)
class RankSlice:
    """One rank's part of a slice, and what it must know of the others' parts.

    Args:
        batch: this rank's molecules.
        masks: what is hidden of them.
        hidden: the same, as rows.
        counts: molecules of each rank; the slice is their concatenation, B molecules.
        rank: this rank.
        scaffold_key_B: scaffold keys of the whole slice.
        generic_key_B: generic scaffold keys of the whole slice.
        views: the bare scaffolds of those of this rank's molecules that are alone with theirs in the slice.
        viewed_V: the rows of these.
    """

    batch: MolBatch
    masks: Masks
    hidden: Hidden
    counts: list[int]
    rank: int
    scaffold_key_B: Tensor
    generic_key_B: Tensor
    views: MolBatch | None = None
    viewed_V: Tensor | None = None

    @property
    def first(self) -> int:
        """This rank's first row in the slice."""
        return sum(self.counts[: self.rank])

    def to(self, device: torch.device | str) -> RankSlice:
        """The same slice on `device`."""
        return RankSlice(
            self.batch.to(device),
            Masks(*(to_device(mask, device) for mask in self.masks)),
            Hidden(*(to_device(rows, device) for rows in self.hidden)),
            self.counts,
            self.rank,
            to_device(self.scaffold_key_B, device),
            to_device(self.generic_key_B, device),
            None if self.views is None else self.views.to(device),
            None if self.viewed_V is None else to_device(self.viewed_V, device),
        )


class Normalizers(NamedTuple):
    """Counts over a whole optimizer step: what losses are divided by, and what else says how much work it is.

    Each is one number on the device, at least 1, in fp32, so rounded to 24 bits. Nobody waits for their values.

    Attributes:
        atoms_hidden: hidden atoms.
        bonds_hidden: hidden bonds.
        anchors: of the contrastive loss.
        molecules: molecules.
        atoms: atoms.
        bonds: bonds.
        fingerprints: fingerprints that are known.
        descriptors: descriptors that are known.
        pairs: pairs of molecules that the contrastive loss compares.
        view_molecules: bare scaffolds.
        view_atoms: their atoms.
    """

    atoms_hidden: Tensor
    bonds_hidden: Tensor
    anchors: Tensor
    molecules: Tensor
    atoms: Tensor
    bonds: Tensor
    fingerprints: Tensor
    descriptors: Tensor
    pairs: Tensor
    view_molecules: Tensor
    view_atoms: Tensor


class Losses(NamedTuple):
    """Terms of the loss, unweighted, each this rank's share of the global mean; `total` is their weighted sum.

    `contrast_temperature` is no term, but this rank's share of what the contrastive loss took as t.
    """

    total: Tensor
    atom: Tensor
    bond: Tensor
    contrast: Tensor
    z: Tensor
    balance: Tensor
    entropy: Tensor
    fingerprint: Tensor
    descriptors: Tensor
    contrast_temperature: Tensor


def count_normalizers(slices: Sequence[RankSlice], device: torch.device | str) -> Normalizers:
    """Add up the counts of all slices, on the CPU, and of all ranks, by one all-reduce on `device`."""
    counts = to_device(torch.tensor([_counts(part) for part in slices], dtype=torch.float64).sum(dim=0), device)
    if len(slices[0].counts) > 1:
        dist.all_reduce(counts)
    return Normalizers(*counts.round().clamp(min=1).float().unbind())


def _counts(part: RankSlice) -> list[float]:
    """This rank's share of the counts of one slice, in the order of `Normalizers`."""
    batch, views = part.batch, part.views
    # Anchors are counted from the whole slice, so each rank adds its share of the same number.
    anchors = count_anchors(part.scaffold_key_B.numpy(), views is not None) / len(part.counts)
    molecules, pairs = batch.num_molecules, batch.num_molecules * sum(part.counts)
    seen = [0, 0] if views is None else [views.num_molecules, views.num_atoms]
    sizes = [molecules, batch.num_atoms, batch.num_bonds]
    return [*(len(rows) for rows in part.hidden), anchors, *sizes, *count_targets(batch), pairs, *seen]


def pretraining_losses(
    model: HMoEModel,
    encoding: Encoding,
    views: ScaffoldRouting | None,
    part: RankSlice,
    objective: ObjectiveConfig,
    norm: Normalizers,
    temperature: float | Tensor,
) -> Losses:
    """This rank's share of the step's loss on one slice; summed over slices and ranks it is the global loss.

    `views`: routing of the bare scaffolds `part.views`; `temperature`: of the contrastive loss.
    """
    batch, h_ND, hidden = encoding.batch, encoding.h_ND, part.hidden
    if (
        batch is not part.batch
    ):  # molecules have migrated, with their masks; which rows these hide only the device knows
        assert encoding.masks is not None
        hidden = hidden_rows(encoding.masks)
    atom_HD, begin_HD, end_HD = hidden_states(h_ND, batch, hidden)
    if model.atom_head is None or model.bond_head is None:
        raise ValueError("the model was made without the heads that it takes to pretrain it")
    atom_logits, bond_logits = model.atom_head(atom_HD), model.bond_head(begin_HD, end_HD)
    z = router_z_loss(encoding, norm.molecules, norm.atoms)
    balance = entropy = z.new_zeros(())
    if objective.balance_weight:
        slots = [layer.gate.slots for layer in model.encoder.moe_layers()]
        balance = router_balance_loss(encoding, part.batch.molecule_N, model.router, slots, norm.molecules, norm.atoms)
    if objective.entropy_weight:
        entropy = choice_entropy(encoding, norm.atoms)
    fingerprint, descriptors = molecule_losses(model, h_ND, batch)
    terms = {
        "atom": masked_atom_loss(atom_logits, batch, hidden) / norm.atoms_hidden,
        "bond": masked_bond_loss(bond_logits, batch, hidden) / norm.bonds_hidden,
        "contrast": _contrast(encoding, views, part, objective, temperature) / norm.anchors,
        "z": z,
        "balance": balance,
        "entropy": entropy,
        "fingerprint": fingerprint / norm.fingerprints,
        "descriptors": descriptors / norm.descriptors,
    }
    weights = objective.weights
    total = sum((weights[name] * term for name, term in terms.items()), start=z.new_zeros(()))
    # A share by molecules, so that it adds up over slices and ranks as the terms do.
    contrast_temperature = batch.num_molecules / norm.molecules * temperature
    parts = {name: term.detach() for name, term in terms.items()}
    return Losses(total, **parts, contrast_temperature=contrast_temperature.detach())


def _contrast(
    encoding: Encoding,
    views: ScaffoldRouting | None,
    part: RankSlice,
    objective: ObjectiveConfig,
    temperature: float | Tensor,
) -> Tensor:
    u_AP = _compared(encoding.scaffold, objective)
    view_AP = None
    if views is not None and part.viewed_V is not None:
        view_AP = torch.zeros_like(u_AP).index_copy(0, part.viewed_V, _compared(views, objective))
    keys = part.scaffold_key_B, part.generic_key_B
    return scaffold_contrast_loss(u_AP, gather_rows(u_AP, part.counts), *keys, part.first, temperature, view_AP)


def _compared(routing: ScaffoldRouting, objective: ObjectiveConfig) -> Tensor:
    """Unit vectors. The product of two roots of distributions is their Bhattacharyya coefficient, 1 when they agree."""
    return routing.u_BP if objective.contrast_of == "embedding" else (routing.log_p_BG / 2).exp()


class PretrainingTask(nn.Module):
    """Model and loss as one module, so that a training engine sees a single forward.

    Args:
        model: the model.
        objective: weights of the loss.
    """

    def __init__(self, model: HMoEModel, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.model = model
        self._objective = objective
        start = torch.tensor([math.log(objective.contrast_temperature)])
        self.log_temperature = nn.Parameter(start) if objective.contrast_learned_temperature else None

    def forward(self, part: RankSlice, norm: Normalizers, stage: RoutingStage = FINAL_STAGE) -> tuple[Losses, Encoding]:
        """This rank's share of the loss on one slice, and the encoding it came from."""
        encoding = self.model(part.batch, part.masks, stage)
        views = None if part.views is None else self.model.encoder.route(part.views, stage=stage)
        losses = pretraining_losses(
            self.model, encoding, views, part, self._objective, norm, self._contrast_temperature()
        )
        return losses, encoding

    def _contrast_temperature(self) -> float | Tensor:
        if self.log_temperature is None:
            return self._objective.contrast_temperature
        # Without a bound, the loss can be made smaller and smaller by sharpening alone (as in CLIP).
        return self.log_temperature.squeeze().float().exp().clamp(min=LEAST_LEARNED_TEMPERATURE)
