"""The ablation: its arms are runs that can start, it measures what a run itself measures, and it resumes."""

import json
import math
import time

import pytest

from benchmarks.ablation.__main__ import summary
from benchmarks.ablation.arms import curve_arms, table_arms
from benchmarks.ablation.bench import Bench, OutOfTimeError
from benchmarks.ablation.datasets import Datasets
from benchmarks.ablation.search import BASE, FLAT, Search, find_arms
from benchmarks.ablation.trial import training_flops, words
from hmoe_ds.config_parser import load_config

SMALL = {
    **BASE,
    "model.hidden_size": 16,
    "model.dense_size": 24,
    "model.lower_blocks": 1,
    "model.upper_blocks": 1,
    "data.atoms_per_step": 600,
    "probe.tables": [],
}


class Oracle:
    """Stands in for a bench: the loss of a trial is the distance of its settings from those that are to be found."""

    def __init__(self, wanted, datasets):
        self.wanted, self.bench = wanted, Bench(None, datasets, BASE, 1.0, 1, 0.0)
        self.bench.flops = lambda settings: 1.0
        self.trials = []

    def trial(self, settings, seed, steps):
        return self.bench.trial(settings, seed, steps)

    def run(self, trials):
        self.trials += trials
        return [{"tune_loss": sum(t.settings.get(k) != v for k, v in self.wanted.items())} for t in trials]


@pytest.mark.parametrize(("form", "groups", "experts"), [
    ("hard", 8, 16), ("two groups", 4, 32), ("soft", 8, 16), ("soft", 4, 32), ("additive", 8, 16)
])  # fmt: skip
def test_the_search_finds_the_best_of_each_part_and_all_arms_can_start(form, groups, experts, dataset):
    datasets = Datasets(dataset, dataset)
    wanted = {
        "router.form": form,
        "optim.learning_rate": 0.004,
        "router.groups": groups,
        "router.experts": experts,
        "objective.contrast_weight": 0.3,
        "curriculum.mask_steps": 200,
    }
    if form == "soft" and experts // 2 // groups >= 2:
        wanted |= {"router.experts_at_start": experts // 2}
    if form in ("hard", "two groups"):
        wanted["router.form"] = None  # the default, which is not written
        wanted["router.groups_per_molecule"] = 2 if form == "two groups" else None
    oracle = Oracle(wanted, datasets)
    search = Search(oracle, 600, {})
    arms = find_arms(search)
    again = Search(oracle, 600, json.loads(json.dumps(search.answers)))
    ran = len(oracle.trials)
    assert find_arms(again) == arms
    assert len(oracle.trials) == ran
    assert again.tried == search.tried
    found = oracle.trial(arms.best, 0, 600).settings
    assert {name: found.get(name) for name in wanted} == wanted
    assert "router.experts_at_start" in arms.complete
    assert ("router.experts_at_start" in arms.best) == ("router.experts_at_start" in wanted)
    table = [oracle.trial(settings, 0, 600) for settings in (*table_arms(arms).values(), *curve_arms(arms).values())]
    for trial in [*oracle.trials, *table]:
        load_config([*words(trial.settings, datasets), "--run.out=x"])


def test_steps_are_those_that_cost_the_same(dataset):
    datasets = Datasets(dataset, dataset)
    cost = training_flops({**SMALL, **FLAT}, datasets)
    bench = Bench(None, datasets, SMALL, cost, 1, 0.0)
    flat, larger = bench.trial(FLAT, 0, 60), bench.trial({**FLAT, "router.expert_size": 640}, 0, 60)
    assert flat.steps == 60
    assert larger.steps < 40
    larger_cost = training_flops(larger.settings, datasets)
    assert larger.steps * larger_cost == pytest.approx(60 * cost, abs=0.5 * larger_cost)


@pytest.mark.slow
def test_the_reported_loss_is_that_of_the_run_itself_and_a_trial_runs_once(dataset, tmp_path):
    datasets = Datasets(dataset, dataset)  # the same molecules to tune and to report on
    bench = Bench(tmp_path, datasets, SMALL, training_flops({**SMALL, **FLAT}, datasets), 2, time.time() + 300)
    trials = [bench.trial({"router.groups": groups}, 0, 3, reported=True) for groups in (2, 4)]
    figures = bench.run(trials)
    for found in figures:
        assert found["report_loss"] == pytest.approx(found["tune_loss"], rel=1e-6)
        assert found["report_consistency"] == pytest.approx(found["tune_consistency"], abs=1e-9)
    assert figures[0]["tune_loss"] != figures[1]["tune_loss"]
    bench.deadline = 0.0
    assert bench.run(trials) == figures
    with pytest.raises(OutOfTimeError, match="1 of 2"):
        bench.run([trials[0], bench.trial({"router.groups": 8}, 0, 3)])


def test_a_summary_pairs_seeds():
    flat = [{"report_loss": loss, "x": loss} for loss in (0.30, 0.31, 0.35)]
    arm = [{"report_loss": loss, "x": 1.0} for loss in (0.29, 0.30, 0.33)]
    found = summary(arm, {"flat": flat, "itself": arm})
    assert found["against flat"] == pytest.approx(-(0.01 + 0.01 + 0.02) / 3)
    assert found["against itself"] == found["detectable against itself"] == 0
    # Student's t for two degrees of freedom, from a table.
    spread = math.sqrt(((0.01 / 3) ** 2 * 2 + (0.02 / 3) ** 2) / 2)
    assert found["detectable against flat"] == pytest.approx(4.303 * spread / math.sqrt(3), rel=1e-3)
    assert found["report_loss"] == pytest.approx(0.92 / 3)
