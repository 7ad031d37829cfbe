"""What ranks would send each other for a step of the run, with and without migration."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hmoe_ds.config import RunConfig
from hmoe_ds.moe.replay import Routing, RowBytes, sent_bytes, sliced

_RANKS = (2, 4, 8, 16, 32, 64)


class ReplayedTraffic(NamedTuple):
    """Bytes that leave all ranks together, for a slice of a step.

    Attributes:
        molecules: of the slice.
        ranks: that share the experts.
        without: migration.
        migrated: with it; None where the form of the gate does not allow it.
    """

    molecules: int
    ranks: int
    without: float
    migrated: float | None


def replayed_traffic(routing: Routing, rows: RowBytes, config: RunConfig) -> list[ReplayedTraffic]:
    """For each number of ranks over which the run's experts could lie, from slices as large as those of the run.

    A slice is smaller where there are not so many molecules.
    """
    router = config.router
    molecules = min(config.data.molecules_per_step // config.optim.accumulation, len(routing.atoms_B))
    steps = sliced(routing, molecules)
    possible = [ranks for ranks in _RANKS if router.experts % ranks == 0 and router.groups % ranks == 0]

    def mean_bytes(ranks: int, budget: float | None) -> float:
        return float(np.mean([sent_bytes(step, rows, router, ranks, budget).sum() for step in steps]))

    budget = config.parallel.migration_budget if router.form == "hard" else None
    return [
        ReplayedTraffic(
            molecules, ranks, mean_bytes(ranks, None), None if budget is None else mean_bytes(ranks, budget)
        )
        for ranks in possible
    ]
