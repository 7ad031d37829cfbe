"""From the global plan to one rank's slices of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hmoe_ds.config import DataConfig, ObjectiveConfig
from hmoe_ds.data.batch import bare_scaffolds, gather, scaffold_keys
from hmoe_ds.data.mixture import Mixture
from hmoe_ds.data.plan import Slice, dealt_order, sequential_slices
from hmoe_ds.objectives.contrast import is_alone
from hmoe_ds.objectives.masking import draw_masks, hidden_rows
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
    order_B, counts = dealt_order(whole.num_atoms_B, ranks)
    first = sum(counts[:rank])
    mine = order_B[first : first + counts[rank]]
    batch = gather(mixture, whole.rows_B[mine])
    scaffold_key, generic_key = scaffold_keys(mixture, whole.rows_B[order_B])
    views = viewed_V = None
    if with_views:
        alone_B = torch.from_numpy(is_alone(scaffold_key)[first : first + len(mine)])
        views, viewed_V = bare_scaffolds(batch, alone_B), alone_B.nonzero().squeeze(1)
    masks = draw_masks(batch, whole.epoch_B[mine], mask_ratio, seed)
    return RankSlice(
        batch=batch,
        masks=masks,
        hidden=hidden_rows(masks),
        counts=counts,
        rank=rank,
        scaffold_key_B=torch.from_numpy(scaffold_key),
        generic_key_B=torch.from_numpy(generic_key),
        views=views,
        viewed_V=viewed_V,
    )


def validation_slices(
    mixture: Mixture, data: DataConfig, objective: ObjectiveConfig, rank: int, ranks: int
) -> Iterator[RankSlice]:
    """This rank's part of the validation molecules; every rank gets the same number of slices."""
    for whole in sequential_slices(mixture, data, data.validation_molecules):
        yield rank_slice(mixture, whole, objective.mask_ratio, VALIDATION_MASK_SEED, rank, ranks)
