"""The collectives that the scaling model counts, against those of real engines on four ranks."""

import json
import subprocess
from collections import Counter

import pytest

from benchmarks.scaling_model.collectives import step_collectives
from benchmarks.scaling_model.machine import measure_fabric, planned_per_second, step_seconds
from benchmarks.scaling_model.worlds import World, make_runs
from data_pipeline.manifest import Manifest
from hmoe_ds.config_parser import load_config
from hmoe_ds.training.dry_run import MeanMolecule
from tests.distributed.harness import run_module

RANKS = 4
SIZES = ["--model.hidden_size=96", "--router.experts=8", "--router.experts_per_atom=2", "--data.molecules_per_step=64"]
LAYOUTS = {
    "experts everywhere": ["--parallel.ep_size=1"],
    "experts on pairs": ["--parallel.ep_size=2"],
    "experts on all": ["--parallel.ep_size=4"],
    "stage 2, two slices": ["--parallel.ep_size=2", "--parallel.zero_stage=2", "--optim.accumulation=2"],
    "recomputed": ["--parallel.ep_size=2", "--parallel.activation_checkpointing=true"],
    "bf16": ["--parallel.ep_size=2", "--parallel.precision=bf16"],
    "migration": ["--parallel.ep_size=2", "--parallel.migration=true"],
}


@pytest.fixture(scope="module")
def logs(dataset, tmp_path_factory):
    """Configuration and calls of each layout."""
    folder = tmp_path_factory.mktemp("collectives")
    words = {name: [*SIZES, f"--data.path={dataset}", *layout] for name, layout in LAYOUTS.items()}
    jobs = [{"out": str(folder / f"{name}.json"), "words": line} for name, line in words.items()]
    run_module("tests.distributed.collective_log", RANKS, [json.dumps(jobs)])
    return {
        name: (load_config(line), json.loads((folder / f"{name}.json").read_text())) for name, line in words.items()
    }


def predicted(config, dataset):
    split = Manifest.load(dataset).splits["train"]
    molecule = MeanMolecule(split.atoms / split.rows, split.bonds / split.rows, "the dataset")
    return step_collectives(config, RANKS, molecule, 1.0 if config.parallel.migration else None)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_call_is_counted(logs, name, dataset):
    config, calls = logs[name]
    expected = Counter()
    for one in predicted(config, dataset):
        expected[one.kind, one.group.ranks] += one.times
    assert Counter((kind, ranks) for kind, ranks, _ in calls if ranks > 1) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "migration"])
def test_bytes_are_those_that_are_sent(logs, name, dataset):
    config, calls = logs[name]
    expected, found = Counter(), Counter()
    for one in predicted(config, dataset):
        expected[one.kind, one.group.ranks] += one.sent * one.times
    for kind, ranks, sent in calls:
        found[kind, ranks] += sent
    for (kind, ranks), size in expected.items():
        if kind != "all_to_all":  # those depend on the routing; `test_footprint` has them
            # DeepSpeed pads what it cuts into shards.
            assert found[kind, ranks] == pytest.approx(size, rel=0.03), (kind, ranks)


@pytest.mark.slow
def test_speeds_of_two_ranks_are_measured():
    fabric = measure_fabric(2)
    assert set(fabric.speeds) == {(kind, 2) for kind in ("all_to_all", "all_reduce", "all_gather")}
    assert all(speed.latency >= 0 and speed.bandwidth > 0 for speed in fabric.speeds.values())


def test_planning_is_measured(dataset):
    config = load_config([f"--data.path={dataset}"])
    assert planned_per_second(config, molecules=500, ranks=8) > 0


@pytest.mark.slow
def test_worlds_make_their_runs_and_those_that_are_there_are_left(dataset, tmp_path):
    words = [*SIZES, f"--data.path={dataset}", "--run.steps=4", "--run.log_every=1", "--run.mlflow=false"]
    folders = [str(tmp_path / name) for name in ("alone", "pair")]
    alone, pair = World(1, {folders[0]: words}, core=0), World(2, {folders[1]: [*words, "--parallel.ep_size=2"]})
    make_runs([[alone], [pair]])
    assert all(step_seconds(tmp_path / name) > 0 for name in ("alone", "pair"))
    lines = tmp_path / "pair" / "metrics.jsonl"
    lines.write_text("as it was\n")
    make_runs([[pair]])
    assert lines.read_text() == "as it was\n"


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_runs(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        make_runs([[World(2, {str(tmp_path / "run"): ["--data.path=nowhere", "--run.steps=4"]})]])
