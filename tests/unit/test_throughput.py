"""What a report says of the steps since the one before."""

import time

import pytest
import torch

from hmoe_ds.config_parser import load_config
from hmoe_ds.model.size import Work, training_flops
from hmoe_ds.moe.balance import RouterLoad
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.objectives.total import Normalizers
from hmoe_ds.training.due import due_after
from hmoe_ds.training.recording.throughput import Throughput

BUDGETS = ["--data.molecules_per_step=100", "--data.atoms_per_step=4000", "--data.bonds_per_step=2000"]


def counts(molecules, atoms, bonds) -> Normalizers:
    numbers = dict.fromkeys(Normalizers._fields, 1) | {"molecules": molecules, "atoms": atoms, "bonds": bonds}
    return Normalizers(*(torch.tensor(float(numbers[name])) for name in Normalizers._fields))


def load(routed) -> RouterLoad:
    ones = torch.ones(2, dtype=torch.float64)
    return RouterLoad(ones, ones, torch.full((2, 4), routed / 8, dtype=torch.float64), ones.sum(), torch.ones(2, 2))


def test_rates_and_fills_are_of_all_steps_since_the_last_report():
    config = load_config(BUDGETS)
    throughput = Throughput(config, Traffic())
    throughput.add(counts(90, 1800, 1000), load(400), seconds=2.0, waited=0.5)
    throughput.add(counts(70, 1400, 1800), load(800), seconds=3.0, waited=0.0)
    report = throughput.report()
    assert report["molecules_per_second"] == pytest.approx(160 / 5)
    assert report["data_wait"] == pytest.approx(0.1)
    assert report["atom_fill"] == pytest.approx(3200 / 8000)
    assert report["budget_fill"] == pytest.approx(160 / 200)  # of molecules; that of bonds is 2800 / 4000
    work = Work(molecules=160, atoms=3200, atoms_hidden=2, bonds_hidden=2, pairs=2, routed=1200)
    assert report["flops_per_second"] == pytest.approx(training_flops(config, work).total / 5)
    throughput.add(counts(10, 3900, 1990), load(8), seconds=1.0, waited=0.0)
    again = throughput.report()
    assert again["molecules_per_second"] == pytest.approx(10)
    assert (again["atom_fill"], again["budget_fill"]) == (pytest.approx(0.975), pytest.approx(0.995))


def test_what_is_due():
    run = load_config(["--run.steps=20", "--run.log_every=4", "--run.validate_every=5", "--run.checkpoint_every=7"]).run
    due = {step: due_after(step, run, probe_every=9) for step in range(1, 21)}
    assert [step for step, one in due.items() if one.validation] == [5, 10, 15, 20]
    assert [step for step, one in due.items() if one.probe] == [9, 18, 20]
    assert [step for step, one in due.items() if one.checkpoint] == [7, 14, 20]
    assert [step for step, one in due.items() if one.line] == [1, 4, 5, 8, 9, 10, 12, 15, 16, 18, 20]
    never = load_config(["--run.steps=3", "--run.log_every=9"]).run
    assert [due_after(step, never, 0) for step in (1, 2, 3)] == [
        (True, False, False, False),
        (False, False, False, False),
        (True, True, True, True),
    ]


def test_the_share_of_exchanges_is_of_ranks_that_exchange():
    traffic = Traffic(timed=True)
    throughput = Throughput(load_config([*BUDGETS, "--parallel.ep_size=2"]), traffic)

    def exchange() -> None:
        with traffic.clock(torch.device("cpu")):
            time.sleep(0.02)

    exchange()  # before the first step
    for taken in (True, False):
        traffic.forget()
        if taken:
            exchange()
        traffic.take()
        exchange()  # of a validation, after the step
        throughput.add(counts(90, 1800, 1000), load(400), seconds=0.02, waited=0.0)
        share = throughput.report()["exchange_share"]
        assert share >= 1 if taken else share == 0  # of the step alone
    alone = Throughput(load_config(BUDGETS), Traffic())
    alone.add(counts(90, 1800, 1000), load(400), seconds=0.2, waited=0.0)
    assert "exchange_share" not in alone.report()
