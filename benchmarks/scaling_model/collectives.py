"""What ranks send each other in one optimizer step, as a list of collectives, from the configuration alone.

Letters: R ranks, s bytes of the run's precision, n parameters that a rank computes with (`training/footprint.py`).

* Experts, per slice and H-MoE layer: how many rows come (a few bytes), then rows there and back, in the forward and in
  the backward; with activation checkpointing the forward's twice. With migration the same calls are made, but most
  rows stay at home, and each slice has five calls more.
* ZeRO, dense parameters over all R ranks, a rank's experts over the R / ep_size that hold them too. By the paper
  (Rajbhandari et al., 2020): stages 1 and 2 reduce-scatter the gradients and all-gather the parameters, 2 s n bytes;
  stage 3 gathers them in the forward and in the backward, 3 s n. DeepSpeed 0.19.8 with our settings *all-reduces* the
  gradients in stages 1 and 2, which is 3 s n; `Reduction` chooses. Stage 1 does it once per step, 2 and 3 per slice.
* Losses: the routing embeddings of all molecules of a slice are gathered on every rank, their gradients all-reduced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hmoe_ds.config import RunConfig
from hmoe_ds.model.size import BYTES, count_parameters, moe_layers, molecules_per_slice
from hmoe_ds.training.deepspeed_config import deepspeed_config
from hmoe_ds.training.dry_run import MeanMolecule
from hmoe_ds.training.footprint import all_to_all_bytes

Part = Literal["all_to_all", "zero", "loss"]
Kind = Literal["all_to_all", "all_reduce", "reduce_scatter", "all_gather"]
Reduction = Literal["all_reduce", "reduce_scatter"]

_FP32 = 4
# DeepSpeed all-gathers each optimizer group: matrices, vectors, experts; two of them are dense.
_DENSE_GROUPS = 2
# All-reduces of a few numbers: by the loop for the counts and the metrics; by DeepSpeed for the gradient norm.
_LOOP_SUMS, _NORM_SUMS, _EXPERT_NORM_SUMS = 2, 3, 1


@dataclass(frozen=True)
class Group:
    """Ranks that take part: `ranks` of them, each `stride` after the one before."""

    ranks: int
    stride: int = 1


@dataclass(frozen=True)
class Collective:
    """One collective call, or several alike.

    Args:
        part: of the step that it belongs to.
        kind: what it does.
        group: who takes part.
        sent: bytes that one rank sends to others in one call (ring algorithms, but for the all-to-all).
        times: calls in a step.
    """

    part: Part
    kind: Kind
    group: Group
    sent: float
    times: int


def ring_bytes(kind: Kind, size: float, ranks: int) -> float:
    """Bytes that one rank sends in a collective on a whole buffer of `size` bytes.

    The buffer is what is reduced, or what there is after gathering; of an all-to-all, what the rank gives.
    """
    return (2 if kind == "all_reduce" else 1) * size * (ranks - 1) / ranks


def step_collectives(
    config: RunConfig,
    ranks: int,
    molecule: MeanMolecule,
    migration_share: float | None = None,
    reduction: Reduction = "all_reduce",
) -> list[Collective]:
    """All collectives of one optimizer step that one rank takes part in; none with one rank.

    Args:
        config: of the run; its `parallel.migration` is not asked.
        ranks: number of ranks R.
        molecule: the mean one.
        migration_share: bytes of the experts' all-to-alls with migration over those without; None without migration.
        reduction: how ZeRO 1 and 2 reduce gradients.
    """
    found = [
        *expert_collectives(config, ranks, molecule, migration_share),
        *zero_collectives(config, ranks, reduction),
        *loss_collectives(config, ranks, molecule),
    ]
    return [one for one in found if one.group.ranks > 1 and one.times]


def expert_collectives(
    config: RunConfig, ranks: int, molecule: MeanMolecule, migration_share: float | None
) -> list[Collective]:
    """The experts' all-to-alls; their bytes are those of `footprint.all_to_all_bytes`."""
    parallel, slices = config.parallel, config.optim.accumulation
    group = Group(parallel.ep_size)
    bytes_per_rank = all_to_all_bytes(config, ranks, molecule.atoms, molecule.bonds).per_rank
    layer_passes = slices * moe_layers(config.model) * (2 if parallel.activation_checkpointing else 1)
    exchanges = 2 * (layer_passes + slices * moe_layers(config.model))
    share = 1.0 if migration_share is None else migration_share
    rows = Collective("all_to_all", "all_to_all", group, share * bytes_per_rank / exchanges, exchanges)
    counts = Collective("all_to_all", "all_to_all", group, 0.0, layer_passes)
    if migration_share is None:
        return [rows, counts]
    plan = Collective("all_to_all", "all_gather", group, 0.0, 2 * slices)
    moves = Collective("all_to_all", "all_to_all", group, 0.0, 3 * slices)  # their bytes are part of the share
    return [rows, counts, plan, moves]


def zero_collectives(config: RunConfig, ranks: int, reduction: Reduction) -> list[Collective]:
    """Reduction of gradients, gathering of parameters, and the gradient norm."""
    parallel = config.parallel
    count = count_parameters(config.model, config.router, config.objective.molecule_heads)
    world = Group(ranks)
    copies = Group(ranks // parallel.ep_size, stride=parallel.ep_size)
    held = [(world, count.dense, _DENSE_GROUPS), (copies, count.experts / parallel.ep_size, 1)]
    found = [
        collective
        for group, parameters, gathers in held
        for collective in _zero_of(config, group, parameters, gathers, reduction)
    ]
    # In stage 1 with bf16 every rank has the whole gradient, and with it the norm of its dense part.
    whole = parallel.zero_stage == 1 and parallel.precision == "bf16"
    norm = [
        Collective("zero", "all_reduce", world, 0.0, 0 if whole else _NORM_SUMS),
        Collective("zero", "all_reduce", copies, 0.0, _EXPERT_NORM_SUMS),
    ]
    return [*found, *norm]


def _zero_of(
    config: RunConfig, group: Group, parameters: float, gathers: int, reduction: Reduction
) -> list[Collective]:
    """Of parameters that `group` shares; they are gathered in `gathers` pieces."""
    stage, slices = config.parallel.zero_stage, config.optim.accumulation
    size = BYTES[config.parallel.precision] * parameters
    bucket = deepspeed_config(config)["zero_optimization"]["reduce_bucket_size"]
    buckets = max(1, math.ceil(parameters / bucket))
    kind: Kind = "reduce_scatter" if stage == 3 else reduction
    reductions = buckets * (1 if stage == 1 else slices)
    pieces = max(gathers, buckets) * (2 * slices if stage == 3 else 1)
    total_reduced = ring_bytes(kind, size, group.ranks) * (1 if stage == 1 else slices)
    total_gathered = ring_bytes("all_gather", size, group.ranks) * (2 * slices if stage == 3 else 1)
    return [
        Collective("zero", kind, group, total_reduced / reductions, reductions),
        Collective("zero", "all_gather", group, total_gathered / pieces, pieces),
    ]


def loss_collectives(config: RunConfig, ranks: int, molecule: MeanMolecule) -> list[Collective]:
    """The contrastive loss's gathering of P fp32 values per molecule of a slice, and sums of a few numbers."""
    world, slices = Group(ranks), config.optim.accumulation
    embeddings = molecules_per_slice(config, molecule.atoms, molecule.bonds) * config.router.gate_size * _FP32
    return [
        Collective("loss", "all_gather", world, ring_bytes("all_gather", embeddings, ranks), slices),
        Collective("loss", "all_reduce", world, ring_bytes("all_reduce", embeddings, ranks), slices),
        Collective("loss", "all_reduce", world, 0.0, _LOOP_SUMS),
    ]


def sent_bytes(collectives: list[Collective], part: Part) -> float:
    """Bytes that one rank sends to others in a step, in one part of it."""
    return sum(one.sent * one.times for one in collectives if one.part == part)
