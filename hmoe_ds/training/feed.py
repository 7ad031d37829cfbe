"""From the global plan to one rank's slices of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from hmoe_ds.config import DataConfig, ObjectiveConfig
from hmoe_ds.data.batch import bare_scaffolds, gather, scaffold_keys
from hmoe_ds.data.mixture import Mixture
from hmoe_ds.data.plan import Slice, deal, sequential_slices
from hmoe_ds.objectives.contrast import is_alone
from hmoe_ds.objectives.masking import draw_masks
from hmoe_ds.objectives.total import RankSlice

# Validation hides the same atoms in every run, so that validation losses of different seeds compare.
VALIDATION_MASK_SEED = 0


def rank_slice(
    mixture: Mixture,
    whole: Slice,
    mask_ratio: float,
    seed: int,
    rank: int,
    ranks: int,
    with_views: bool = False,
) -> RankSlice:
    """Deal a slice over the ranks and gather the molecules of `rank`, on the CPU.

    `with_views`: also the bare scaffolds of those that are alone with theirs.
    """
    rank_B = deal(whole.num_atoms_B, ranks)
    order_B = np.argsort(rank_B, kind="stable")
    counts = np.bincount(rank_B, minlength=ranks)
    first = int(counts[:rank].sum())
    mine = order_B[first : first + counts[rank]]
    batch = gather(mixture, whole.rows_B[mine])
    scaffold_key, generic_key = scaffold_keys(mixture, whole.rows_B[order_B])
    views = viewed_B = None
    if with_views:
        viewed_B = torch.from_numpy(is_alone(scaffold_key)[first : first + len(mine)])
        views = bare_scaffolds(batch, viewed_B)
    return RankSlice(
        batch=batch,
        masks=draw_masks(batch, whole.epoch_B[mine], mask_ratio, seed),
        counts=counts.tolist(),
        rank=rank,
        scaffold_key_B=torch.from_numpy(scaffold_key),
        generic_key_B=torch.from_numpy(generic_key),
        views=views,
        viewed_B=viewed_B,
    )


def validation_slices(
    mixture: Mixture, data: DataConfig, objective: ObjectiveConfig, rank: int, ranks: int
) -> Iterator[RankSlice]:
    """This rank's part of the validation molecules; every rank gets the same number of slices."""
    for whole in sequential_slices(mixture, data, data.validation_molecules):
        yield rank_slice(mixture, whole, objective.mask_ratio, VALIDATION_MASK_SEED, rank, ranks)
