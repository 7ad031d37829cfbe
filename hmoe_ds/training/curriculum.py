"""Curriculum: what a step trains on, and how, as a function of its number alone.

With the progress x = min(1, t / steps) of 0-based step t, from a start to its end::

    competence  c = 1 - (1 - start) (1 - x), or its square-root form sqrt(1 - (1 - start^2) (1 - x)), or by DeepSpeed
    atom share  a = x
    temperature tau = end * (start / end)^(1 - x)
    guidance    lambda = end + (start - end) (1 - x)
    mask ratio  end + (start - end) (1 - x)

The competence is the share of the training molecules that are admitted, by complexity (`data/plan.py`); a, tau and
lambda are those of the gates (`moe/gate.py`). There is no state: a run that is resumed goes on where it was.

Source of the competence: Platanios et al., "Competence-based Curriculum Learning for Neural Machine Translation", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from hmoe_ds.config import CurriculumConfig, RunConfig
from hmoe_ds.moe.gate import RoutingStage


class Stage(NamedTuple):
    """What the curriculum says of one step.

    Attributes:
        competence: share of the training molecules that are admitted, the simplest ones.
        atom_share: share of the atom level in the routing weights.
        temperature: of the scaffold gate.
        guidance: lambda of the form `soft`.
        mask_ratio: expected share of hidden atoms and bonds.
    """

    competence: float
    atom_share: float
    temperature: float
    guidance: float
    mask_ratio: float

    @property
    def routing(self) -> RoutingStage:
        """What the gates need to know."""
        return RoutingStage(self.atom_share, self.temperature, self.guidance)


class Curriculum:
    """The stages of a run.

    Args:
        config: of the run; without a curriculum every stage is the final one.
    """

    def __init__(self, config: RunConfig) -> None:
        self._curriculum, self._final_temperature = config.curriculum, config.router.temperature
        self._final_guidance, self._final_mask_ratio = config.router.guidance, config.objective.mask_ratio
        self._competence = _competence(config.curriculum)

    def stage(self, step: int) -> Stage:
        """The stage of 0-based `step`."""
        curriculum = self._curriculum
        hotter = curriculum.temperature_start / self._final_temperature
        freer = curriculum.guidance_start - self._final_guidance
        fewer = curriculum.mask_start - self._final_mask_ratio
        return Stage(
            competence=self._competence(step),
            atom_share=_progress(step, curriculum.atom_fade_steps),
            temperature=self._final_temperature * hotter ** (1 - _progress(step, curriculum.temperature_steps)),
            guidance=self._final_guidance + freer * (1 - _progress(step, curriculum.guidance_steps)),
            mask_ratio=self._final_mask_ratio + fewer * (1 - _progress(step, curriculum.mask_steps)),
        )


def _competence(curriculum: CurriculumConfig) -> Callable[[int], float]:
    start, steps = curriculum.competence_start, curriculum.competence_steps
    if curriculum.competence == "linear":
        return lambda step: 1 - (1 - start) * (1 - _progress(step, steps))
    if curriculum.competence == "root":
        return lambda step: math.sqrt(1 - (1 - start**2) * (1 - _progress(step, steps)))
    if curriculum.competence == "deepspeed":
        return _deepspeed_competence(curriculum)
    return lambda step: 1.0


def _deepspeed_competence(curriculum: CurriculumConfig) -> Callable[[int], float]:
    # Here, because it takes seconds, which other curricula need not cost.
    from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

    scheduler = CurriculumScheduler(curriculum.deepspeed_schedule)
    return lambda step: scheduler.get_difficulty(step + 1) / 100  # it counts steps from 1


def _progress(step: int, steps: int) -> float:
    """How far something has come at 0-based `step` that takes `steps` steps; all the way when it takes none."""
    return min(1.0, step / steps) if steps else 1.0
