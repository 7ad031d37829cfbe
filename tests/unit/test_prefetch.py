"""Steps that are made ahead are those that the plan gives."""

import pytest
import torch

from hmoe_ds.config_parser import load_config
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.training.curriculum import Curriculum
from hmoe_ds.training.feed import rank_slice
from hmoe_ds.training.prefetch import Prefetcher
from hmoe_ds.training.run_folder import open_datasets

OVERRIDES = ["--run.steps=6", "--run.seed=3", "--optim.accumulation=2", "--data.molecules_per_step=40"]
OVERRIDES += ["--curriculum.competence=linear", "--curriculum.competence_steps=4", "--curriculum.mask_steps=4"]


def prepared(dataset):
    config = load_config(["--config", "tiny_cpu", f"--data.path={dataset}", "--run.out=x", *OVERRIDES])
    molecules, _ = open_datasets(config)
    return config, molecules, BatchPlan(molecules, config.data, config.optim.accumulation, config.run.seed)


@pytest.mark.parametrize("first", [0, 4])
def test_the_steps_are_those_of_the_plan_in_its_order(dataset, first):
    config, molecules, plan = prepared(dataset)
    _, _, other_plan = prepared(dataset)
    curriculum = Curriculum(config)
    for step in range(first):
        for moved in (plan, other_plan):
            moved.next_step(curriculum.stage(step).competence)
    with Prefetcher(molecules, plan, config, first, rank=1, ranks=2) as ahead:
        for step in range(first, 6):
            slices, stage, state = ahead.step()
            assert stage == curriculum.stage(step)
            wholes = other_plan.next_step(stage.competence)
            assert state == other_plan.state_dict()
            assert len(slices) == len(wholes) == 2
            for found, whole in zip(slices, wholes, strict=True):
                expected = rank_slice(molecules, whole, stage.mask_ratio, 3, rank=1, ranks=2)
                assert torch.equal(found.batch.mol_key_B2, expected.batch.mol_key_B2)
                assert torch.equal(found.masks.atom_N, expected.masks.atom_N)
                assert found.counts == expected.counts
        with pytest.raises(IndexError):  # the run is over
            ahead.step()


def test_what_goes_wrong_in_the_thread_is_raised_where_steps_are_taken(dataset, monkeypatch):
    config, molecules, plan = prepared(dataset)
    monkeypatch.setattr(molecules, "shard", None)
    with Prefetcher(molecules, plan, config, 0, rank=0, ranks=1) as ahead, pytest.raises(TypeError):
        ahead.step()
