"""Invariant 6: a run that was resumed is bitwise the run that never stopped."""

import shutil

import pytest
from safetensors.torch import load_file

from hmoe_ds.config import ConfigError, load_config
from hmoe_ds.downstream.export import export_checkpoint
from hmoe_ds.training.preflight import check_run
from tests.distributed.harness import arguments, train, train_all

LAYOUTS = {
    "ep 1, zero 1": {},
    "ep 2, zero 1": {"parallel__ep_size": 2},
    "ep 1, zero 2": {"parallel__zero_stage": 2},
    "ep 2, zero 2": {"parallel__ep_size": 2, "parallel__zero_stage": 2},
    "ep 2, zero 1, bf16": {"parallel__ep_size": 2, "parallel__precision": "bf16"},
}
COMMON = {"run__steps": 6, "run__checkpoint_every": 2, "data__molecules_per_step": 48}


def cut_back(folder, step, last):
    """Make a run look as if it had crashed after `step`: later checkpoints are gone."""
    shutil.rmtree(folder / "checkpoints" / f"step{last:08d}")
    (folder / "checkpoints" / "latest").write_text(f"step{step:08d}")


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """-> {layout: (folder and metrics of the uninterrupted run, folder and metrics of the resumed run)}."""
    folder = tmp_path_factory.mktemp("resume")
    overrides = {name: COMMON | changes for name, changes in LAYOUTS.items()}
    whole = {folder / f"whole {name}": changes for name, changes in overrides.items()}
    resumed = {folder / f"resumed {name}": changes for name, changes in overrides.items()}
    whole_metrics = train_all(whole, dataset, ranks=2)
    for before, after in zip(whole, resumed, strict=True):
        shutil.copytree(before, after)
        cut_back(after, step=4, last=6)
    resumed_metrics = train_all(resumed, dataset, ranks=2)
    return {
        name: ((w, whole_metrics[w]), (r, resumed_metrics[r]))
        for name, w, r in zip(LAYOUTS, whole, resumed, strict=True)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_run_is_bitwise_the_uninterrupted_one(layout, runs, tmp_path):
    (whole, whole_metrics), (resumed, resumed_metrics) = runs[layout]
    for lines in (whole_metrics, resumed_metrics):
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in whole_metrics] == [line["loss"] for line in resumed_metrics]
    export_checkpoint(whole, tmp_path / "whole")
    export_checkpoint(resumed, tmp_path / "resumed")
    export_checkpoint(resumed / "checkpoints" / "step00000004", tmp_path / "before")
    first, second, before = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed", "before")
    )
    assert all((first[name] == second[name]).all() for name in first)
    assert any((first[name] != before[name]).any() for name in first)


def test_a_single_rank_resumes_bitwise(dataset, tmp_path):
    whole = train(tmp_path / "run", dataset, **COMMON)
    cut_back(tmp_path / "run", step=2, last=6)
    resumed = train(tmp_path / "run", dataset, **COMMON)
    assert [(line["step"], line["loss"]) for line in whole] == [(line["step"], line["loss"]) for line in resumed]


@pytest.mark.parametrize(
    ("ranks", "change", "message"),
    [
        (2, {"model__hidden_size": 32}, "model.hidden_size is 32"),
        (2, {"run__resume": "never"}, "run.resume is never"),
        (1, {}, "was trained on 2 ranks, this start has 1"),
    ],
)
def test_a_run_that_cannot_be_continued_is_refused(ranks, change, message, runs, dataset):
    folder = runs["ep 1, zero 1"][0][0]
    with pytest.raises(ConfigError, match=message):
        check_run(load_config(arguments(folder, dataset, **COMMON, **change)), ranks)


def test_a_longer_run_may_continue_a_shorter_one(runs, dataset):
    folder = runs["ep 1, zero 1"][0][0]
    check_run(load_config(arguments(folder, dataset, **(COMMON | {"run__steps": 12}))), ranks=2)
