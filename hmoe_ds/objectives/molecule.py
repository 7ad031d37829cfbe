"""Molecule-level objectives: a molecule's Morgan fingerprint and its descriptors, from its readout.

Both kinds of target are usual in pretraining on molecules (Li et al., "A knowledge-guided pre-training framework for
improving molecular representation learning", Nature Communications, 2023). The forms of the losses:

Fingerprint, with counts c_mv and logits s_mv over the bins v, summed over molecules m::

    l_m = sum over v of q_mv (log q_mv - log softmax(s_m)_v),   q_mv = c_mv / sum over v' of c_mv'

the Kullback-Leibler divergence, in nats, from the spread of the molecule's atom environments over the bins: the
multinomial likelihood of the counts, given their sum (as of word counts: Liang et al., "Variational autoencoders for
collaborative filtering", 2018), less its minimum, so that 0 is perfect. Its gradient is bounded, whatever the counts.

Descriptors, standardised over the training molecules: Huber's loss of threshold 1 (Huber, "Robust estimation of a
location parameter", 1964), summed over those that are known; the distribution of many has a heavy tail.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hmoe_ds.data.batch import MolBatch
from hmoe_ds.data.mixture import Mixture
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.readout import read_out
from hmoe_ds.moe.wide import wide


class KnownTargets(NamedTuple):
    """How many fingerprints and how many descriptors are known."""

    fingerprint: int = 0
    descriptors: int = 0


def count_targets(batch: MolBatch) -> KnownTargets:
    """The known targets of a batch on the CPU."""
    if batch.targets is None:
        return KnownTargets()
    fingerprint_BV, descriptors_BT = batch.targets
    return KnownTargets(int(fingerprint_BV.any(dim=1).sum()), int(descriptors_BT.isfinite().sum()))


def fingerprint_loss(logits_BV: Tensor, fingerprint_BV: Tensor) -> Tensor:
    """Sum of l_m, in nats; a fingerprint that is not known adds nothing."""
    log_p_BV = wide(logits_BV).log_softmax(dim=-1)
    count_BV = fingerprint_BV.to(log_p_BV.dtype)
    share_BV = count_BV / count_BV.sum(dim=-1, keepdim=True).clamp(min=1)
    return F.kl_div(log_p_BV, share_BV, reduction="sum")


def descriptor_loss(predicted_BT: Tensor, standardized_BT: Tensor) -> Tensor:
    """Sum of Huber's loss, in standard deviations; a descriptor that is not known, NaN, adds nothing."""
    known_BT = standardized_BT.isfinite()
    # Zeroed on both sides before the difference: NaN times 0 would be NaN.
    target_BT = standardized_BT.masked_fill(~known_BT, 0.0)
    return F.smooth_l1_loss(wide(predicted_BT).masked_fill(~known_BT, 0.0), target_BT, reduction="sum")


def molecule_losses(model: HMoEModel, h_ND: Tensor, batch: MolBatch) -> tuple[Tensor, Tensor]:
    """Sums of both losses over B molecules, from their atom states; 0 for a head that the model does not have.

    Raises:
        ValueError: a head, and no targets in `batch`.
    """
    fingerprint = descriptors = h_ND.new_zeros(())
    if model.heads is None or not model.heads.names:
        return fingerprint, descriptors
    if batch.targets is None:
        raise ValueError("the batch has no targets for the model's heads: open its dataset with targets=True")
    readout_BW = read_out(model.heads.readout, h_ND, batch)
    if model.fingerprint_head is not None:
        fingerprint = fingerprint_loss(model.fingerprint_head(readout_BW), batch.targets.fingerprint_BV)
    if model.descriptor_head is not None:
        standardized_BT = model.descriptor_head.standardize(batch.targets.descriptors_BT)
        descriptors = descriptor_loss(model.descriptor_head(readout_BW, batch.ptr_B.diff()), standardized_BT)
    return fingerprint, descriptors


def set_descriptor_scale(model: HMoEModel, molecules: Mixture) -> None:
    """Let a descriptor head standardise by the means and standard deviations over the training molecules.

    A run that is resumed goes on with those in its checkpoint, whatever was appended to the dataset since.
    """
    if model.descriptor_head is not None:
        model.descriptor_head.set_scale(*map(torch.from_numpy, molecules.descriptor_scale()))
