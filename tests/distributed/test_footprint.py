"""Memory and traffic from the configuration alone, against real DeepSpeed engines on two ranks."""

import dataclasses
import json

import pytest

from hmoe_ds.config import RunConfig
from hmoe_ds.config_parser import load_config
from hmoe_ds.training.footprint import all_to_all_bytes, memory_per_rank
from tests.distributed.harness import run_module

RANKS = 2
# Large enough for parameters to outweigh a batch of eight molecules and what DeepSpeed keeps besides.
SIZES = [
    *("--model.hidden_size=192", "--model.dense_size=384", "--router.experts=8", "--router.experts_per_atom=2"),
    *("--router.expert_size=192", "--data.molecules_per_step=16", "--data.scaffold_run=1", "--optim.accumulation=2"),
]
OFFLOAD = {"device": "cpu", "pin_memory": False}
# Name: ZeRO settings, overrides.
ENGINES = {
    "stage 1, bf16": ({"stage": 1}, ["--parallel.precision=bf16"]),
    "stage 1, fp32": ({"stage": 1}, []),
    "stage 2, bf16": ({"stage": 2}, ["--parallel.precision=bf16"]),
    "stage 2, fp32, experts not spread": ({"stage": 2}, ["--parallel.ep_size=1"]),
    "stage 1, fp32, migration": ({"stage": 1}, ["--parallel.migration=true"]),
    "stage 2, bf16, offloaded": ({"stage": 2, "offload_optimizer": OFFLOAD}, ["--parallel.precision=bf16"]),
}


@pytest.fixture(scope="module")
def engines(dataset, tmp_path_factory) -> dict[str, tuple[RunConfig, dict]]:
    """The configuration and the measurement of each engine."""
    folder = tmp_path_factory.mktemp("engines")
    jobs, configs = [], {}
    for number, (name, (zero, overrides)) in enumerate(ENGINES.items()):
        settings = {
            "zero_optimization": {"reduce_bucket_size": 1000, **zero},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
        (folder / f"{number}.ds.json").write_text(json.dumps(settings))
        layout = [f"--data.path={dataset}", "--parallel.ep_size=2", f"--parallel.zero_stage={zero['stage']}"]
        layout += [f"--parallel.deepspeed_config={folder / f'{number}.ds.json'}"]
        layout += [f"--parallel.offload_optimizer={'true' if 'offload_optimizer' in zero else 'false'}"]
        words = [*SIZES, *layout, *overrides]
        configs[name] = load_config(words)
        jobs.append({"out": str(folder / f"{number}.json"), "words": words})
    run_module("tests.distributed.engine_bytes", RANKS, [json.dumps(jobs)])
    return {
        name: (configs[name], json.loads((folder / f"{number}.json").read_text()))
        for number, name in enumerate(ENGINES)
    }


@pytest.mark.parametrize("name", ENGINES)
def test_model_states_are_the_tensors_of_the_engine(engines, name):
    config, measured = engines[name]
    parallel = config.parallel
    memory = memory_per_rank(config, RANKS, parallel.zero_stage, parallel.offload_optimizer, atoms=15, bonds=15)
    expected = memory.parameters + memory.gradients + memory.optimizer + memory.host
    assert measured["states"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", ["stage 1, fp32", "stage 1, bf16", "stage 2, fp32, experts not spread"])
def test_traffic_is_the_rows_given_to_all_to_alls(engines, name):
    config, measured = engines[name]
    # As many atoms as the measured step had: 16 molecules of this mean.
    atoms = measured["atoms"] / config.data.molecules_per_step
    traffic = all_to_all_bytes(config, RANKS, atoms, bonds=atoms)
    if config.parallel.ep_size == 1:
        assert (measured["rows"], traffic.total) == (0, 0)
        return
    # Under balanced routing half of the rows are for the other of two ranks.
    assert measured["rows"] == pytest.approx(2 * traffic.total)
    assert measured["elsewhere"] == pytest.approx(traffic.total, rel=0.5)
    assert traffic.per_rank * RANKS == traffic.total


def test_recomputing_sends_half_as_much_again():
    config = load_config(["--parallel.ep_size=2"])
    again = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, activation_checkpointing=True))
    assert all_to_all_bytes(again, 2, 20, 20).total == 1.5 * all_to_all_bytes(config, 2, 20, 20).total


@pytest.mark.parametrize("name", ENGINES)
def test_traffic_is_counted_exactly(engines, name):
    _, measured = engines[name]
    assert measured["counted"] == measured["elsewhere"]
    assert (measured["counted"] > 0) == ("not spread" not in name)


def test_molecules_that_migrate_send_less_than_their_atoms_would(engines):
    (_, without), (_, with_migration) = (engines[f"stage 1, fp32{name}"] for name in ("", ", migration"))
    assert with_migration["atoms"] == without["atoms"]
    # Some molecules find no room beside their experts: a step has only sixteen.
    assert with_migration["counted"] < 0.7 * without["counted"]
