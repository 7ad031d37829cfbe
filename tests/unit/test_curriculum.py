"""The stages of a curriculum: closed forms, DeepSpeed's scheduler, and nothing at all when it is off."""

import math

import pytest

from hmoe_ds.config import CurriculumConfig, ObjectiveConfig, RouterConfig, RunConfig
from hmoe_ds.training.curriculum import Curriculum

LAST = 40
LONG_AFTER = 1000


def stages(**fields):
    config = RunConfig(
        curriculum=CurriculumConfig(**fields),
        router=RouterConfig(form="soft", temperature=0.3, guidance=2.0),
        objective=ObjectiveConfig(mask_ratio=0.15),
    )
    curriculum = Curriculum(config)
    return [curriculum.stage(step) for step in (*range(LAST + 2), LONG_AFTER)]


def test_without_a_curriculum_every_stage_is_the_final_one():
    assert not CurriculumConfig().active
    assert set(stages()) == {(1.0, 1.0, 0.3, 2.0, 0.15)}


@pytest.mark.parametrize(("name", "power"), [("linear", 1), ("root", 2)])
@pytest.mark.parametrize("start", [0.01, 0.35, 1.0])
def test_competence_has_the_closed_form_of_its_source(name, power, start):
    found = [s.competence for s in stages(competence=name, competence_start=start, competence_steps=LAST)]
    for step, competence in enumerate(found[:-1]):
        # Platanios et al., 2019, equations 5 and 6.
        expected = min(1.0, (step * (1 - start**power) / LAST + start**power) ** (1 / power))
        assert competence == pytest.approx(expected, abs=1e-12)
    assert found[LAST] == found[-1] == 1.0
    assert found == sorted(found)


def test_the_other_curricula_have_their_closed_forms():
    found = stages(
        atom_fade_steps=LAST,
        temperature_start=1.2,
        temperature_steps=LAST,
        guidance_start=0.5,
        guidance_steps=LAST,
        mask_start=0.05,
        mask_steps=LAST,
    )
    assert {stage.competence for stage in found} == {1.0}
    for step, stage in enumerate(found[: LAST + 1]):
        assert stage.atom_share == pytest.approx(step / LAST)
        expected = math.log(1.2) + step / LAST * (math.log(0.3) - math.log(1.2))
        assert math.log(stage.temperature) == pytest.approx(expected)
        assert stage.guidance == pytest.approx(0.5 + step / LAST * 1.5)
        assert stage.mask_ratio == pytest.approx(0.05 + step / LAST * 0.1)
        assert stage.routing == (stage.atom_share, stage.temperature, stage.guidance)
    assert found[LAST] == found[-1] == (1.0, 1.0, 0.3, 2.0, 0.15)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("fixed_linear", {"total_curriculum_step": LAST, "difficulty_step": 8}),
        ("fixed_root", {"total_curriculum_step": LAST, "difficulty_step": 1, "root_degree": 3}),
        ("fixed_discrete", {"difficulty": [10, 40, 100], "max_step": [5, 30]}),
    ],
)
def test_deepspeed_raises_the_competence_as_it_raises_a_difficulty(kind, settings):
    from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

    schedule = {"min_difficulty": 10, "max_difficulty": 100, "schedule_type": kind, "schedule_config": settings}
    found = [stage.competence for stage in stages(competence="deepspeed", deepspeed_schedule=schedule)]
    # As DeepSpeed's engine does it: one object that is told of every step, the first one being step 1.
    scheduler = CurriculumScheduler(schedule)
    expected = [scheduler.update_difficulty(step) / 100 for step in range(1, LAST + 3)]
    assert found[:-1] == expected
    assert found[0] >= CurriculumConfig(competence="deepspeed", deepspeed_schedule=schedule).lowest_competence == 0.1
    assert found[-1] == 1.0
    assert found == sorted(found)
