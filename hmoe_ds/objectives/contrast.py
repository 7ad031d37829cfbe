"""Scaffold routing contrastive loss: molecules with one scaffold are to be routed alike, others apart.

For an anchor m with positives P(m) (same scaffold, n != m) and negatives N(m) (different generic scaffold)::

    l_m = mean over n in P(m) of -log( exp(<u_m, u_n>/t) / sum over n' in P(m) or N(m) of exp(<u_m, u_n'>/t) )

Molecules with the same generic but different scaffold are neither. Acyclic molecules are neither anchors nor
positives. A molecule that is alone with its scaffold may take a view of itself as its positive: its bare scaffold.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def count_anchors(scaffold_key_B: NDArray[np.int64], with_views: bool = False) -> int:
    """Molecules of a slice that share their (non-empty) scaffold with another one; `with_views` those alone, too."""
    return int(((scaffold_key_B != 0) & (with_views | ~is_alone(scaffold_key_B))).sum())


def is_alone(scaffold_key_B: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True where no other molecule of a slice has the scaffold, which is not empty."""
    _, place_B, counts = np.unique(scaffold_key_B, return_inverse=True, return_counts=True)
    return (counts[place_B] == 1) & (scaffold_key_B != 0)


def scaffold_contrast_loss(
    u_AP: Tensor,
    u_BP: Tensor,
    scaffold_key_B: Tensor,
    generic_key_B: Tensor,
    first: int,
    temperature: float | Tensor,
    view_AP: Tensor | None = None,
) -> Tensor:
    """Sum of l_m over the anchors among this rank's A molecules.

    Args:
        u_AP: routing embeddings of this rank's molecules, rows `first` to `first + A` of the slice.
        u_BP: routing embeddings of all B molecules of the slice.
        scaffold_key_B: scaffold keys of the slice; 0 = acyclic.
        generic_key_B: generic scaffold keys of the slice.
        first: this rank's first row in the slice.
        temperature: t.
        view_AP: views of this rank's molecules; one that is alone with its scaffold takes its own as its positive.
    """
    rows = slice(first, first + u_AP.shape[0])
    scaffold_A, generic_A = scaffold_key_B[rows, None], generic_key_B[rows, None]
    itself_AB = torch.arange(len(scaffold_key_B), device=u_AP.device) == torch.arange(
        first, first + u_AP.shape[0], device=u_AP.device
    ).unsqueeze(1)
    positive_AB = (scaffold_A == scaffold_key_B) & (scaffold_A != 0) & ~itself_AB
    compared_AB = positive_AB | (generic_A != generic_key_B)
    similarity_AB = (u_AP @ u_BP.t()) / temperature
    similarity_AB = similarity_AB.masked_fill(~compared_AB, -torch.inf)
    positives_A = positive_AB.sum(dim=1)
    if view_AP is not None:
        takes_view_A = (positives_A == 0) & (scaffold_A.squeeze(1) != 0)
        view_A = ((u_AP * view_AP).sum(dim=1) / temperature).masked_fill(~takes_view_A, -torch.inf)
        similarity_AB = torch.cat([similarity_AB, view_A.unsqueeze(1)], dim=1)
        positive_AB = torch.cat([positive_AB, takes_view_A.unsqueeze(1)], dim=1)
        positives_A = positives_A + takes_view_A
    log_total_A = similarity_AB.logsumexp(dim=1)
    mean_positive_A = similarity_AB.masked_fill(~positive_AB, 0.0).sum(dim=1) / positives_A.clamp(min=1)
    # A row without anything to compare has log_total -inf; it is no anchor, and `where` keeps it out of the gradient.
    is_anchor_A = positives_A > 0
    log_total_A = torch.where(is_anchor_A, log_total_A, 0.0)
    return (log_total_A - mean_positive_A * is_anchor_A).sum()
