"""Step time: compute + update + experts' all-to-alls + ZeRO's collectives + losses' collectives + waiting for the plan.

Nothing overlaps: dispatch waits for its rows, and with the settings in `ds_configs` DeepSpeed reduces gradients in the
backward's stream. Left out: ranks that wait for slower ones, uneven experts, validation, checkpoints, the network's
other users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from benchmarks.scaling_model.collectives import Collective, Reduction, step_collectives
from benchmarks.scaling_model.fabric import Fabric
from hmoe_ds.config import RunConfig
from hmoe_ds.model.size import flops_per_molecule, molecules_per_slice
from hmoe_ds.training.dry_run import MeanMolecule
from hmoe_ds.training.footprint import parameters_per_rank


@dataclass(frozen=True)
class Work:
    """What one rank computes in one optimizer step.

    Args:
        flops: of matrix products.
        atoms: that pass the model.
        slices: forwards and backwards.
        blocks: of the model.
        shard: parameters that it updates.
        molecules: that the plan of the step holds, of all ranks.
    """

    flops: float
    atoms: float
    slices: int
    blocks: int
    shard: float
    molecules: float


class Processor(Protocol):
    """What computes."""

    def compute(self, work: Work) -> float:
        """Seconds of the forwards and backwards of one step."""
        ...

    def update(self, work: Work) -> float:
        """Seconds of the optimizer."""
        ...

    def plan(self, work: Work) -> float:
        """Seconds of the host until the molecules of a step are there, beside what computes; 0 if part of `compute`."""
        ...


@dataclass(frozen=True)
class Gpu:
    """A GPU and its share of the host.

    Args:
        flops_per_second: achieved in a slice that is large.
        launch_seconds: of one kernel by the host; no slice takes less than its launches.
        launches_per_block: kernels of a block in forward and backward, counted as torch's operators.
        seconds_per_parameter: of AdamW with fp32 states.
        planned_per_second: molecules of the global batch that a rank's host plans and deals per second.
    """

    flops_per_second: float
    launch_seconds: float
    launches_per_block: int
    seconds_per_parameter: float
    planned_per_second: float

    def compute(self, work: Work) -> float:
        """The longer of arithmetic and launches, as kernels run while others are launched."""
        launches = work.slices * work.blocks * self.launches_per_block * self.launch_seconds
        return max(work.flops / self.flops_per_second, launches)

    def update(self, work: Work) -> float:
        return work.shard * self.seconds_per_parameter

    def plan(self, work: Work) -> float:
        return work.molecules / self.planned_per_second


@dataclass(frozen=True)
class Core:
    """A share of this machine's CPU cores.

    Args:
        fixed_seconds: of a step whatever its size.
        seconds_per_atom: of forward and backward.
        seconds_per_parameter: of AdamW.
        ranks_per_core: ranks that take turns on one core; 1 at least.
    """

    fixed_seconds: float
    seconds_per_atom: float
    seconds_per_parameter: float
    ranks_per_core: float

    def compute(self, work: Work) -> float:
        return self.ranks_per_core * (self.fixed_seconds * work.slices + self.seconds_per_atom * work.atoms)

    def update(self, work: Work) -> float:
        return self.ranks_per_core * self.seconds_per_parameter * work.shard

    def plan(self, work: Work) -> float:
        """Measured steps wait for their molecules, so that is in them already."""
        return 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest rank, by part; all of them count, nothing overlaps.

    Args:
        compute: forwards and backwards.
        update: the optimizer.
        all_to_all: of the experts and of migration.
        zero: reduction of gradients, gathering of parameters.
        loss: collectives of the losses.
        waiting: for the host to plan the next step, as far as that takes longer than all the rest.
    """

    compute: float
    update: float
    all_to_all: float
    zero: float
    loss: float
    waiting: float

    @property
    def total(self) -> float:
        return self.compute + self.update + self.all_to_all + self.zero + self.loss + self.waiting


def rank_work(config: RunConfig, ranks: int, molecule: MeanMolecule) -> Work:
    """What each of `ranks` ranks computes when the step is dealt evenly."""
    slices = config.optim.accumulation
    molecules = slices * molecules_per_slice(config, molecule.atoms, molecule.bonds)
    return Work(
        flops=flops_per_molecule(config, molecule.atoms, molecule.bonds).total * molecules / ranks,
        atoms=molecule.atoms * molecules / ranks,
        slices=slices,
        blocks=config.model.lower_blocks + config.model.upper_blocks,
        shard=parameters_per_rank(config, ranks)[1],
        molecules=molecules,
    )


def step_time(
    config: RunConfig,
    ranks: int,
    molecule: MeanMolecule,
    processor: Processor,
    fabric: Fabric,
    migration_share: float | None = None,
    reduction: Reduction = "all_reduce",
) -> StepTime:
    """Seconds of one optimizer step; arguments as of `step_collectives`.

    With migration a rank may have `parallel.migration_budget` times the mean number of atoms, and the slowest counts.
    """
    work = rank_work(config, ranks, molecule)
    collectives = step_collectives(config, ranks, molecule, migration_share, reduction)
    compute = processor.compute(work) * (1.0 if migration_share is None else config.parallel.migration_budget)
    update = processor.update(work)
    parts = {part: _seconds_of(collectives, part, fabric) for part in ("all_to_all", "zero", "loss")}
    waiting = max(0.0, processor.plan(work) - compute - update - sum(parts.values()))
    return StepTime(compute, update, parts["all_to_all"], parts["zero"], parts["loss"], waiting)


def _seconds_of(collectives: list[Collective], part: str, fabric: Fabric) -> float:
    return sum(one.times * fabric.seconds(one) for one in collectives if one.part == part)
