"""Steps made ahead: a background thread gathers the molecules of the next steps while this one is computed."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

from hmoe_ds.config import RunConfig
from hmoe_ds.data.mixture import Mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.objectives.total import RankSlice
from hmoe_ds.training.curriculum import Curriculum, Stage
from hmoe_ds.training.feed import rank_slice

# One is made while one is computed; the second evens out what takes longer, such as a shard's first molecules.
_AHEAD = 2


class PreparedStep(NamedTuple):
    """What one rank needs for one optimizer step.

    Attributes:
        slices: this rank's part of each slice.
        stage: of the curriculum.
        plan: state of the plan after the step.
    """

    slices: list[RankSlice]
    stage: Stage
    plan: dict[str, Any]


class Prefetcher:
    """This rank's steps from `first_step` to the last of the run, in the plan's order.

    One thread walks the plan, and nothing else does, so what a step holds is the same as without it. It works in the
    context of this object.

    Args:
        molecules: what the plan deals.
        plan: at its position before `first_step`; from now on it belongs to the thread.
        config: of the run.
        first_step: 0-based.
        rank: this rank.
        ranks: of the run.
    """

    def __init__(
        self, molecules: Mixture, plan: BatchPlan, config: RunConfig, first_step: int, rank: int, ranks: int
    ) -> None:
        self._molecules, self._plan, self._config = molecules, plan, config
        self._curriculum = Curriculum(config)
        self._rank, self._ranks = rank, ranks
        self._next = first_step
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._ahead: deque[Future[PreparedStep]] = deque()

    def __enter__(self) -> Prefetcher:
        self._begin_steps()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def step(self) -> PreparedStep:
        """The next step; waits until it is made. Raises what went wrong in making it."""
        made = self._ahead.popleft().result()
        self._begin_steps()
        return made

    def _begin_steps(self) -> None:
        while len(self._ahead) < _AHEAD and self._next < self._config.run.steps:
            self._ahead.append(self._thread.submit(self._make, self._next))
            self._next += 1

    def _make(self, step: int) -> PreparedStep:
        stage, seed = self._curriculum.stage(step), self._config.run.seed
        views = self._config.objective.contrast_bare_scaffold
        slices = [
            rank_slice(self._molecules, whole, stage.mask_ratio, seed, self._rank, self._ranks, views)
            for whole in self._plan.next_step(stage.competence)
        ]
        return PreparedStep(slices, stage, self._plan.state_dict())
