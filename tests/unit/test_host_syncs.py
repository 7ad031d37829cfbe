"""On a GPU nothing of a step lets the host wait, but for the counts of rows of experts: held by the operators called.

An operator whose result's size depends on values, or that gives a value to the host, waits for the device. So does
taking rows by a mask. On the CPU the same operators are called, but for those inside the loops over bonds.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hmoe_ds.config import DataConfig
from hmoe_ds.config_parser import load_config
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.model import messages
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.moe.balance import measure_load
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.objectives.total import PretrainingTask, count_normalizers
from hmoe_ds.training.feed import rank_slice
from hmoe_ds.training.loop import balance_routers
from hmoe_ds.training.recording.metrics import StepTotals
from hmoe_ds.training.recording.throughput import Throughput

WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
VARIANTS = {
    "hard": [],
    "two groups, two slices": ["--router.groups_per_molecule=2", "--optim.accumulation=2"],
    "soft, all losses": [
        *("--router.form=soft", "--objective.balance_weight=0.1", "--objective.entropy_weight=0.1"),
        *("--objective.contrast_learned_temperature=true", "--objective.contrast_bare_scaffold=true"),
        *("--objective.fingerprint_weight=0.1", "--objective.descriptor_weight=0.1"),
    ],
    "additive": ["--router.form=additive", "--router.experts_per_atom=2"],
    "flat, recomputed": ["--router.form=flat", "--parallel.activation_checkpointing=true"],
    "experts that split": ["--router.experts_at_start=4", "--objective.balance_weight=0.1"],
}


class Waits(TorchDispatchMode):
    """Names of the operators called that let the host wait for a device: of executors of experts, and of all else."""

    def __init__(self):
        super().__init__()
        self.found, self.in_executors, self.executions, self._executes = [], [], 0, False

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        sized = name == "repeat_interleave" and not (keywords or {}).get("output_size")
        masked = name in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in arguments[1])
        if name in WAITING or sized or masked:
            self.add(name)
        return function(*arguments, **(keywords or {}))

    def add(self, name):
        (self.in_executors if self._executes else self.found).append(name)

    def begin_executor(self, *_):
        self._executes, self.executions = True, self.executions + 1

    def end_executor(self, *_):
        self._executes = False


@pytest.fixture
def waits(monkeypatch):
    """What waits in operators, and in methods that hand values to the host without one."""
    found = Waits()
    for name in ("tolist", "numpy", "cpu"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, watched(found, name, method))
    return found


def watched(waits, name, method):
    def call(tensor, *arguments, **keywords):
        waits.add(name)
        return method(tensor, *arguments, **keywords)

    return call


def step(config, store, waits):
    """One optimizer step as the loop does it, watched from the slices on; without an engine."""
    views = config.objective.contrast_bare_scaffold
    plan = BatchPlan(store, config.data, config.optim.accumulation, seed=0)
    slices = [rank_slice(store, whole, config.objective.mask_ratio, 0, 0, 1, views) for whole in plan.next_step()]
    model = HMoEModel(config.model, config.router, heads=config.objective.molecule_heads)
    model.encoder.recompute = config.parallel.activation_checkpointing
    for layer in model.encoder.moe_layers():
        layer.executor.register_forward_pre_hook(waits.begin_executor)
        layer.executor.register_forward_hook(waits.end_executor)
    task, totals = PretrainingTask(model, config.objective), StepTotals(Traffic(timed=True))
    norm = count_normalizers(slices, "cpu")  # counted on the CPU before anything is sent to a device
    waits.found.clear()  # what the CPU has done of it
    with waits:
        for part in slices:
            losses, encoding = task(part, norm)
            losses.total.backward()
            load = measure_load(encoding.scaffold, encoding.atoms, part.batch.molecule_N, config.router)
            totals.add(losses, load)
        sums = totals.reduce()
        balance_routers(task, sums.load, config)
        Throughput(config, Traffic()).add(norm, sums.load, seconds=1.0, waited=0.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_waits_for_nothing_but_the_counts_of_experts(variant, dataset_with_targets, waits, monkeypatch):
    config = load_config(["--data.molecules_per_step=60", *VARIANTS[variant]])
    store = open_mixture(DataConfig(path=str(dataset_with_targets)), "train", targets=True)
    monkeypatch.setattr(messages, "_is_looped", lambda *_: False)
    step(config, store, waits)
    assert waits.found == []
    assert waits.executions >= 2 * config.optim.accumulation
    # How many rows each expert has: counted, then given to the host.
    assert len(waits.in_executors) <= 2 * waits.executions


def test_what_waits_is_found(waits):
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    with waits:
        x[mask]
        x[mask] = 0.0
        mask.nonzero()
        x.sum().item()
        x.tolist()
        torch.arange(3).repeat_interleave(torch.tensor([1, 2, 0]))
        torch.arange(3).repeat_interleave(torch.tensor([1, 2, 0]), output_size=3)
        x[torch.tensor([0, 2])]
        x.relu().index_select(0, torch.tensor([1]))
    assert waits.found == ["index", "index_put_", "nonzero", "_local_scalar_dense", "tolist", "repeat_interleave"]
