"""Invariant 6: a run that was resumed is bitwise the run that never stopped."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from data_pipeline.build import PrepareOptions, prepare
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.manifest import Manifest
from hmoe_ds.config import ConfigError
from hmoe_ds.config_parser import load_config
from hmoe_ds.downstream.export import CheckpointError, export_checkpoint
from hmoe_ds.model.checkpoint_record import CheckpointFile, write_list
from hmoe_ds.training.checks import disk_check
from hmoe_ds.training.checks.preflight import check_run
from hmoe_ds.training.run_folder import open_datasets, read_run_record
from tests.distributed.harness import arguments, train_all

pytestmark = pytest.mark.timeout(1500)  # of the launches in the fixture together
# All at once, none of them at its end when the run stops.
CURRICULA = {
    "curriculum__competence": "deepspeed",
    "curriculum__deepspeed_schedule": json.dumps(
        {
            "min_difficulty": 10,
            "max_difficulty": 100,
            "schedule_type": "fixed_root",
            "schedule_config": {"total_curriculum_step": 6, "difficulty_step": 4, "root_degree": 2},
        }
    ),
    "curriculum__atom_fade_steps": 6,
    "curriculum__temperature_steps": 7,
    "curriculum__mask_steps": 5,
}
SPLITS = {
    "router__form": "flat",
    "router__groups": 2,
    "router__experts_at_start": 4,
    "router__split_every": 1,
}
LAYOUTS = {
    "ep 1, zero 1": {},
    "ep 2, zero 1, mixture": {"parallel__ep_size": 2, "data__path": "mixture", "data__weights": [3.0, 1.0]},
    "ep 2, zero 1, migration": {"parallel__ep_size": 2, "parallel__migration": "true"},
    "ep 2, zero 3": {"parallel__ep_size": 2, "parallel__zero_stage": 3, "parallel__activation_checkpointing": "true"},
    "ep 2, zero 2, offload": {
        "parallel__ep_size": 2,
        "parallel__zero_stage": 2,
        "parallel__offload_optimizer": "true",
    },
    "ep 2, zero 3, bf16": {"parallel__ep_size": 2, "parallel__zero_stage": 3, "parallel__precision": "bf16"},
    # What the descriptors are standardised by must stay that of the molecules that the run began with.
    "ep 2, zero 1, data appended": {
        "parallel__ep_size": 2,
        "data__path": "growing",
        "objective__fingerprint_weight": 0.3,
        "objective__descriptor_weight": 0.6,
    },
    # The decision after step 3 looks at loads from before the stop.
    "ep 2, zero 2, splits": SPLITS | {"parallel__ep_size": 2, "parallel__zero_stage": 2, "router__split_every": 3},
    # Splits before the stop and after it.
    "ep 2, zero 1, bf16, splits": SPLITS | {"parallel__ep_size": 2, "parallel__precision": "bf16"},
    "ep 2, zero 2, data appended, curricula": CURRICULA
    | {"parallel__ep_size": 2, "parallel__zero_stage": 2, "data__path": "growing"},
}
MORE_LAYOUTS = {
    "ep 2, zero 1": {"parallel__ep_size": 2},
    "ep 1, zero 2": {"parallel__zero_stage": 2},
    "ep 2, zero 2": {"parallel__ep_size": 2, "parallel__zero_stage": 2},
    "ep 1, zero 3": {"parallel__zero_stage": 3},
    "ep 2, zero 1, bf16": {"parallel__ep_size": 2, "parallel__precision": "bf16"},
}
# A run stops after half of its steps.
LAST, STOPPED = 4, 2
COMMON = {"run__steps": LAST, "run__checkpoint_every": 2, "run__validate_every": 3, "data__molecules_per_step": 48}


def cut_back(folder):
    """Make a run look as if it had crashed after `STOPPED` steps: later checkpoints are gone."""
    shutil.rmtree(folder / "checkpoints" / f"step{LAST:08d}")
    (folder / "checkpoints" / "latest").write_text(f"step{STOPPED:08d}")


@pytest.fixture(scope="module")
def growing(dataset_with_targets, tmp_path_factory):
    """A dataset that is appended to while a run trains on it."""
    folder = tmp_path_factory.mktemp("growing") / "prepared"
    shutil.copytree(dataset_with_targets, folder)
    return folder


@pytest.fixture(scope="module")
def runs(dataset, second_dataset, growing, tmp_path_factory):
    """-> {layout: (folder and metrics of the uninterrupted run, folder and metrics of the resumed run)}."""
    known = {"mixture": [str(dataset), str(second_dataset)], "growing": growing}
    layouts = {
        name: {key: known.get(str(value), value) for key, value in changes.items()} for name, changes in LAYOUTS.items()
    }

    def append():
        options = PrepareOptions(validation_fraction=0.15, shard_rows=300, targets=True)
        prepare([str(second_dataset.parent / "molecules.smi")], growing, options, append=True)

    return interrupted_runs(layouts, dataset, tmp_path_factory.mktemp("resume"), append)


def interrupted_runs(layouts, dataset, folder, meanwhile):
    """What the fixture `runs` returns; `meanwhile` is called while the runs are interrupted."""
    whole = {folder / f"whole {name}": COMMON | changes for name, changes in layouts.items()}
    resumed = {folder / f"resumed {name}": COMMON | changes for name, changes in layouts.items()}
    whole_metrics = train_all(whole, dataset, ranks=2)
    for before, after in zip(whole, resumed, strict=True):
        shutil.copytree(before, after)
        cut_back(after)
    meanwhile()
    resumed_metrics = train_all(resumed, dataset, ranks=2)
    return {
        name: ((w, whole_metrics[w]), (r, resumed_metrics[r]))
        for name, w, r in zip(layouts, whole, resumed, strict=True)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_run_is_bitwise_the_uninterrupted_one(layout, runs, tmp_path):
    check_same(*runs[layout], tmp_path)


@pytest.mark.slow
def test_more_resumed_runs_are_bitwise_the_uninterrupted_ones(dataset, tmp_path):
    for number, pair in enumerate(interrupted_runs(MORE_LAYOUTS, dataset, tmp_path, lambda: None).values()):
        check_same(*pair, tmp_path / f"exports{number}")


def check_same(one, other, tmp_path):
    (whole, whole_metrics), (resumed, resumed_metrics) = one, other
    for lines in (whole_metrics, resumed_metrics):
        assert [line["step"] for line in lines] == list(range(1, LAST + 1))
    assert [line["loss"] for line in whole_metrics] == [line["loss"] for line in resumed_metrics]
    export_checkpoint(whole, tmp_path / "whole")
    export_checkpoint(resumed, tmp_path / "resumed")
    export_checkpoint(resumed / "checkpoints" / f"step{STOPPED:08d}", tmp_path / "before")
    first, second, before = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed", "before")
    )
    assert all((first[name] == second[name]).all() for name in first)
    assert any((first[name] != before[name]).any() for name in first)


def test_the_curricula_went_on_where_they_were(runs, growing):
    (whole, lines), (resumed, resumed_lines) = runs["ep 2, zero 2, data appended, curricula"]
    for name in ("competence", "atom_share", "temperature", "mask_ratio"):
        values = [line[name] for line in lines]
        assert values == [line[name] for line in resumed_lines]
        assert values == sorted(values, reverse=name == "temperature")
        assert values[0] != values[STOPPED] != values[-1]
        assert name not in runs["ep 2, zero 3"][0][1][0]
    # The bounds are those of the molecules that the run began with.
    first, last = (
        json.loads((folder / "checkpoints" / f"step{LAST:08d}" / "checkpoint.json").read_text())["plan"]
        for folder in (whole, resumed)
    )
    assert first == last
    assert first["complexity_percentiles"] != [Manifest.load(growing).splits["train"].complexity_percentiles]


@pytest.mark.parametrize(
    ("name", "steps"), [("ep 2, zero 2, splits", [3]), ("ep 2, zero 1, bf16, splits", [1, 2, 3, 4])]
)
def test_splits_are_decided_again_as_they_were(name, steps, runs):
    (whole, _), (resumed, _) = runs[name]
    splits = (whole / "allocation.jsonl").read_text()
    assert [json.loads(line)["step"] for line in splits.splitlines()] == [step for step in steps for _ in range(2)]
    assert (resumed / "allocation.jsonl").read_text() == splits


def test_a_new_run_sees_what_was_appended(runs, dataset_with_targets, growing, tmp_path):
    (folder, _), _ = runs["ep 2, zero 1, data appended"]
    before = open_datasets(load_config(arguments(folder, growing)))
    after = open_datasets(load_config(arguments(tmp_path / "new", growing)))
    ungrown = open_datasets(load_config(arguments(tmp_path / "new", dataset_with_targets)))
    for grown, original, first in zip(after, before, ungrown, strict=True):
        assert len(grown) > len(original) == len(first)
        assert original.fingerprint == first.fingerprint != grown.fingerprint


def test_a_single_rank_resumes_bitwise_and_a_finished_run_is_left_alone(dataset, tmp_path):
    # Beside it a run in two parts, whose schedule is fixed by decay_steps from the start.
    two_parts = COMMON | {"optim__decay_steps": LAST}
    first = {tmp_path / "run": COMMON, tmp_path / "parts": two_parts | {"run__steps": STOPPED}}
    metrics = train_all(first, dataset, ranks=1)
    whole = metrics[tmp_path / "run"]
    shutil.copytree(tmp_path / "run", tmp_path / "finished")
    cut_back(tmp_path / "run")
    second = {tmp_path / "run": COMMON, tmp_path / "parts": two_parts, tmp_path / "finished": COMMON}
    again = train_all(second, dataset, ranks=1)
    losses = [(line["step"], line["loss"]) for line in whole]
    assert losses == [(line["step"], line["loss"]) for line in again[tmp_path / "run"]]
    assert losses == [(line["step"], line["loss"]) for line in again[tmp_path / "parts"]]
    assert whole == again[tmp_path / "finished"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__hidden_size": 32}, "model.hidden_size is 32"),
        ({"run__resume": "never"}, "run.resume is never"),
        ({"run__steps": 3}, "run.steps is 3, but the run in .* has done 4"),
    ],
)
def test_a_run_that_cannot_be_continued_is_refused(change, message, runs, dataset):
    folder = runs["ep 1, zero 1"][0][0]
    with pytest.raises(ConfigError, match=message):
        check_run(load_config(arguments(folder, dataset, **(COMMON | change))), ranks=2)


def test_what_may_pass_does_not_end_a_run_for_good(runs, dataset, monkeypatch):
    """A launcher that starts it again is told so by the exit code."""
    config = load_config(arguments(runs["ep 1, zero 1"][0][0], dataset, **COMMON))
    check_run(config, ranks=2)
    with monkeypatch.context() as full_disk:
        full_disk.setattr(disk_check.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(PipelineError, match="has 0 GiB free") as error:
            check_run(config, ranks=2)
    assert not isinstance(error.value, UsageError)

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(PipelineError, match=r"run\.json cannot be read now .*Stale file handle") as error:
        read_run_record(Path(config.run.out))
    assert not isinstance(error.value, UsageError)


def test_a_longer_run_may_continue_a_shorter_one(runs, dataset):
    folder = runs["ep 1, zero 1"][0][0]
    check_run(load_config(arguments(folder, dataset, **(COMMON | {"run__steps": 2 * LAST}))), ranks=2)


def test_a_damaged_record_or_other_molecules_are_named(runs, dataset, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs["ep 1, zero 1"][0][0], folder)
    config = load_config(arguments(folder, dataset, **COMMON))
    record = folder / "run.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"dataset": "another"}))
    with pytest.raises(ConfigError, match="does not begin with the molecules that the run"):
        check_run(config, ranks=2)
    record.write_text("")
    with pytest.raises(ConfigError, match=r"run\.json cannot be read"):
        check_run(config, ranks=2)


def test_a_field_that_is_younger_than_the_run_has_its_default(runs, dataset, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs["ep 1, zero 1"][0][0], folder)
    content = json.loads((folder / "run.json").read_text())
    del content["config"]["optim"]["decay_steps"]
    (folder / "run.json").write_text(json.dumps(content))
    check_run(load_config(arguments(folder, dataset, **COMMON)), ranks=2)
    with pytest.raises(ConfigError, match=r"optim\.decay_steps is 9, but the run in .* has 0"):
        check_run(load_config(arguments(folder, dataset, **COMMON, optim__decay_steps=9)), ranks=2)


def test_an_incomplete_checkpoint_is_not_exported(runs, tmp_path):
    checkpoint = tmp_path / "step00000004"
    shutil.copytree(runs["ep 2, zero 3"][0][0] / "checkpoints" / "step00000004", checkpoint)

    def refused(message):
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(checkpoint, tmp_path / "model")
        assert not (tmp_path / "model").exists()

    experts = checkpoint / "experts-00001-of-00002.safetensors"
    content = experts.read_bytes()
    experts.unlink()
    refused(r"step00000004 lacks experts-00001-of-00002\.safetensors: copy the whole checkpoint")
    experts.write_bytes(content[: len(content) // 2])
    refused(r"experts-00001-of-00002\.safetensors is damaged: it has \d+ bytes")
    shutil.copy(checkpoint / "experts-00000-of-00002.safetensors", experts)
    refused(r"experts-00001-of-00002\.safetensors is damaged: its checksum")
    experts.write_bytes(content)
    weights = checkpoint / "weights.safetensors"
    save_file({name: value for name, value in load_file(weights).items() if "atom_head" not in name}, weights)
    write_list(checkpoint, [CheckpointFile.of(weights), CheckpointFile.of(experts)])
    refused(r"atom_head\S+ has shape None, expected")
    record = checkpoint / "checkpoint.json"
    written = record.read_text()
    record.write_text(written.replace('"format_version": 2', '"format_version": 7'))
    refused(r"checkpoint\.json has format_version 7, expected 2")
    record.write_text(written[:100])
    refused(r"checkpoint\.json is damaged")
    record.unlink()
    refused("step00000004 holds no checkpoint: give a run's folder")
