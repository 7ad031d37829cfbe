"""Routing of an exported model on the steps of a run's plan, recorded in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hmoe_ds.config import RunConfig
from hmoe_ds.data.batch import Masks, MolBatch
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan, Slice
from hmoe_ds.model.encoder import Encoding
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.moe.balance import update_route_bias
from hmoe_ds.moe.migration import byte_columns
from hmoe_ds.moe.replay import Ints, Routing, RowBytes
from hmoe_ds.training.feed import rank_slice

# Molecules that are encoded at once: routing does not depend on the company, memory does.
_AT_ONCE = 512


class Recording(NamedTuple):
    """Routing of each slice, and what is sent of it.

    Attributes:
        slices: of all steps, one after the other.
        rows: the same for all of them.
    """

    slices: list[Routing]
    rows: RowBytes


@torch.no_grad()
def record(model: HMoEModel, config: RunConfig, steps: int) -> Recording:
    """Where `model` routes the molecules of the first `steps` steps of a run, with what is hidden of them there.

    Args:
        model: exported, in evaluation mode.
        config: of the run, without a curriculum.
        steps: optimizer steps; with accumulation each has several slices.
    """
    mixture = open_mixture(config.data, "train", targets=any(config.objective.molecule_heads))
    plan = BatchPlan(mixture, config.data, config.optim.accumulation, config.run.seed)
    slices: list[Routing] = []
    for _ in range(steps):
        for whole in plan.next_step():
            pieces = []
            for piece in _pieces(whole):
                part = rank_slice(mixture, piece, config.objective.mask_ratio, config.run.seed, rank=0, ranks=1)
                encoding = model(part.batch, part.masks)
                pieces.append(_routing(part.batch, encoding))
                rows = _row_bytes(part.batch, part.masks, encoding)
            slices.append(_joined(pieces))
    return Recording(slices, rows)


@torch.no_grad()
def settle(model: HMoEModel, config: RunConfig, steps: int) -> None:
    """Go on balancing the groups for `steps` steps with the weights as they are; changes the gate's bias.

    The steps are those of a run with another seed: what is recorded afterwards the bias has not seen.

    A gate is trained in small steps, while many ranks have large ones. What balance can do depends on their size: the
    fewer molecules a group has in a step, the more its load varies from step to step.
    """
    mixture = open_mixture(config.data, "train")
    plan = BatchPlan(mixture, config.data, 1, config.run.seed + 1)
    gate, groups = model.encoder.scaffold_gate, config.router.groups
    for _ in range(steps):
        (whole,) = plan.next_step()
        atoms_G = torch.zeros(groups, dtype=torch.float64)
        for piece in _pieces(whole):
            part = rank_slice(mixture, piece, config.objective.mask_ratio, config.run.seed, rank=0, ranks=1)
            groups_BC = model.encoder.route(part.batch, part.masks).groups_BC
            atoms_G += torch.bincount(groups_BC[part.batch.molecule_N].flatten(), minlength=groups)
        update_route_bias(gate.route_bias, atoms_G, config.router.group_balance_rate)


def _pieces(whole: Slice) -> Iterator[Slice]:
    for first in range(0, len(whole.rows_B), _AT_ONCE):
        yield Slice(*(column[first : first + _AT_ONCE] for column in whole))


def _routing(batch: MolBatch, encoding: Encoding) -> Routing:
    bond_molecule_M = batch.molecule_N[batch.edge_index_2M[0, ::2]]
    return Routing(
        atoms_B=_ints(batch.ptr_B.diff()),
        bonds_B=_ints(torch.bincount(bond_molecule_M, minlength=batch.num_molecules)),
        scaffold_B=_ints(batch.scaffold_key_B),
        groups_BC=_ints(encoding.scaffold.groups_BC),
        experts_LNK=_ints(torch.stack([routing.choices_NK for routing in encoding.atoms])),
    )


def _ints(values: Tensor) -> Ints:
    return values.numpy().astype(np.int64, copy=False)


def _joined(pieces: list[Routing]) -> Routing:
    atoms, bonds, scaffold, groups, experts = zip(*pieces, strict=True)
    atoms_B, bonds_B, scaffold_B, groups_BC = (np.concatenate(of) for of in (atoms, bonds, scaffold, groups))
    return Routing(atoms_B, bonds_B, scaffold_B, groups_BC, np.concatenate(experts, axis=1))


def _row_bytes(batch: MolBatch, masks: Masks, encoding: Encoding) -> RowBytes:
    """Widths of the rows that a rank with these molecules sends."""
    scaffold = encoding.scaffold
    shares = scaffold.groups_BC.shape[1] * scaffold.log_p_BG.element_size()
    columns = byte_columns(batch, masks, scaffold.groups_BC)
    widths = [sum(column.shape[1] * column.element_size() for column in of_kind) for of_kind in columns]
    return RowBytes(encoding.h_ND.shape[1] * encoding.h_ND.element_size(), shares, *widths)
