"""Routing of an exported model on the steps of a run's plan, recorded in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from hmoe_ds.config import RunConfig
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan, Slice
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.moe.balance import update_route_bias
from hmoe_ds.moe.replay import Routing, RowBytes, joined
from hmoe_ds.report.recording import routing_of, row_bytes
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
    mixture = open_mixture(config.data, "train", targets=config.objective.needs_targets)
    plan = BatchPlan(mixture, config.data, config.optim.accumulation, config.run.seed)
    slices: list[Routing] = []
    for _ in range(steps):
        for whole in plan.next_step():
            pieces = []
            for piece in _pieces(whole):
                part = rank_slice(mixture, piece, config.objective.mask_ratio, config.run.seed, rank=0, ranks=1)
                encoding = model(part.batch, part.masks)
                pieces.append(routing_of(part.batch, encoding))
                rows = row_bytes(part.batch, part.masks, encoding)
            slices.append(joined(pieces))
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
