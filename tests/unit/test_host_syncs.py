"""On a GPU nothing of a step lets the host wait, but for the counts of rows of experts: held by the operators called.

An operator whose result's size depends on values, or that gives a value to the host, waits for the device. So does
taking rows by a mask. On the CPU the same operators are called, but for those inside the loops over bonds.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hmoe_ds.model import messages
from tests.unit.prepared_step import VARIANTS, PreparedStep

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


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_waits_for_nothing_but_the_counts_of_experts(variant, dataset_with_targets, waits, monkeypatch):
    monkeypatch.setattr(messages, "_is_looped", lambda *_: False)
    step = PreparedStep(variant, dataset_with_targets)
    for layer in step.task.model.encoder.moe_layers():
        layer.executor.register_forward_pre_hook(waits.begin_executor)
        layer.executor.register_forward_hook(waits.end_executor)
    waits.found.clear()  # what the CPU has done for the step before anything is sent to a device
    with waits:
        step.run()
    assert waits.found == []
    assert waits.executions >= 2 * step.config.optim.accumulation
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
