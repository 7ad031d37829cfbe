"""All of a step is done on the device that it was sent to: no operator is given, or makes, anything on the CPU.

A GPU would refuse some of it in the middle of a run, and copy the rest while the host waits. The device here is torch's
`meta`, which has shapes and no values, so that it needs no GPU. What needs values there is in `test_host_syncs`.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hmoe_ds.moe import grouped
from tests.unit.prepared_step import VARIANTS, PreparedStep


class OnTheCpu(TorchDispatchMode):
    """Operators that were given, or made, a tensor on the CPU; single numbers may be there."""

    def __init__(self):
        super().__init__()
        self.found, self.calls = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.calls += 1
        tensors = [x for x in tree_leaves((arguments, keywords, result)) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "cpu" and x.dim() for x in tensors):
            self.found.append(str(function))
        return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_of_a_step_is_on_the_cpu(variant, dataset_with_targets, monkeypatch):
    monkeypatch.setattr(grouped, "_has_grouped_kernel", lambda *_: True)  # as on Hopper
    step = PreparedStep(variant, dataset_with_targets)
    step.to("meta", torch.bfloat16)
    with OnTheCpu() as watch:
        step.run()
    assert watch.found == []
    assert watch.calls > 1000
    assert all(weight.grad.is_meta for weight in step.task.parameters() if weight.grad is not None)


def test_what_is_on_the_cpu_is_found():
    x_NM, rows = torch.empty(4, 3, device="meta"), torch.tensor([0, 2])
    with OnTheCpu() as watch:
        x_NM[rows]
        x_NM * torch.tensor(2.0)
        x_NM.sum(dim=1)
        torch.zeros(3)
    assert watch.found == ["aten.index.Tensor", "aten.zeros.default"]
