"""A run at work: its gate stays healthy on real molecules, and the host does not wait for the device at each slice."""

from tests.distributed.harness import arguments, read_metrics, run_module


def test_the_host_waits_for_the_device_only_for_a_line_of_figures(dataset, tmp_path):
    settings = {"run__steps": 6, "run__log_every": 3, "optim__accumulation": 2}
    run_module("tests.distributed.device_waits", 1, arguments(tmp_path / "run", dataset, **settings))


def test_gate_is_healthy_after_100_steps(dataset, tmp_path):
    settings = {
        "config": "tiny_cpu",
        "data.path": dataset,
        "run.out": tmp_path / "run",
        "run.steps": 100,
        "run.mlflow": "false",
    }
    # That ranks compute what one process does is held elsewhere.
    run_module("hmoe_ds.training.loop", 1, [f"--{name}={value}" for name, value in settings.items()])
    validation = read_metrics(tmp_path / "run")[-1]
    assert validation["validation_group_entropy"] >= 0.8
    assert validation["validation_consistency"] > 0.3
    # A gate that overrides its own choice by bias shows as a chosen p that falls to 1/G.
    assert validation["validation_chosen_p"] > 1.2 / 4
    assert validation["validation_loss_atom"] < 0.8 * validation["validation_atom_entropy"]
