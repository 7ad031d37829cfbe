"""Dispatch over ranks against one process, on drawn cases: `python -m tests.distributed.dispatch_ranks EP_SIZE`.

Every rank draws the same cases. What a rank finds is shared before it is judged, so all of them fail together.
"""

import dataclasses
import sys

import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from hmoe_ds.config import RouterConfig
from hmoe_ds.moe.deepspeed_ep import ExpertParallelExecutor
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.moe.experts import LocalExecutor
from hmoe_ds.training.engine import init_distributed
from tests.unit.test_host_syncs import Waits

D, F = 6, 5


@st.composite
def cases(draw, ranks, ep_size):
    """Sizes, where the tokens go (anywhere, or all to one expert), and the share of unused choices."""
    experts = ep_size * draw(st.integers(1, 4))
    k = draw(st.integers(1, experts))
    target = draw(st.one_of(st.none(), st.integers(0, experts - 1)))
    tokens = draw(st.lists(st.sampled_from([0, 0, 1, 2, 7, 40]), min_size=ranks, max_size=ranks))
    max_rows = draw(st.sampled_from([1, 3, 1000]))
    unused = draw(st.sampled_from([0.0, 0.5]))
    return experts, k, target, tokens, max_rows, unused, draw(st.integers(0, 2**31))


def draw_tokens(case):
    """-> states, choices, weights and output gradients of all ranks' tokens, in rank order."""
    experts, k, target, tokens, _, unused, seed = case
    generator = torch.Generator().manual_seed(seed)
    count = sum(tokens)
    preference_NE = torch.rand(count, experts, generator=generator)
    if target is not None:
        preference_NE[:, target] += 1  # everybody's first choice
    x_ND, dy_ND = (torch.randn(count, D, generator=generator, dtype=torch.float64) for _ in range(2))
    weights_NK = torch.rand(count, k, generator=generator, dtype=torch.float64)
    choices_NK = preference_NE.topk(k, dim=1).indices
    choices_NK[torch.rand(count, k, generator=generator) < unused] = experts
    return x_ND, choices_NK, weights_NK, dy_ND


def run(executor: nn.Module, x_ND, choices_NK, weights_NK, dy_ND):
    """-> output, gradients of states and weights; gradients of parameters stay in the executor."""
    x_ND, weights_NK = x_ND.clone().requires_grad_(), weights_NK.clone().requires_grad_()
    y_ND = executor(x_ND, choices_NK, weights_NK)
    y_ND.backward(dy_ND)
    return y_ND.detach(), x_ND.grad, weights_NK.grad


def difference(case, rank, ranks, ep_size) -> float:
    """Largest deviation on this rank of outputs and gradients from those of one process with all tokens."""
    experts, _, _, tokens, max_rows, unused, seed = case
    everything = draw_tokens(case)
    mine = [part.split(tokens)[rank] for part in everything]
    router = RouterConfig(groups=1, experts=experts, expert_size=F, top_p=0.5 if unused else 1.0)
    bounded = dataclasses.replace(router, max_received=max_rows)
    whole = LocalExecutor(router, D, seed=seed, layer=1).double()
    spread = ExpertParallelExecutor(bounded, D, seed=seed, layer=1, ep_size=ep_size, traffic=Traffic()).double()
    spread.set_deepspeed_parallelism()
    expected = [part.split(tokens)[rank] for part in run(whole, *everything)]
    pairs = list(zip(run(spread, *mine), expected, strict=True))
    first = (rank % ep_size) * spread.num_local_experts
    for weight, reference in zip(spread.experts.parameters(), whole.experts.parameters(), strict=True):
        # An expert's gradient is summed over the ranks that hold a copy of it, as the engine does.
        gradients = [torch.empty_like(weight.grad) for _ in range(ranks)]
        dist.all_gather(gradients, weight.grad)
        total = sum(gradients[rank % ep_size :: ep_size])
        pairs.append((total, reference.grad[first : first + spread.num_local_experts]))
    return max((found - wanted).abs().max().item() if wanted.numel() else 0.0 for found, wanted in pairs)


def check_waits(ep_size: int) -> None:
    """On a GPU, the host would wait for the counts of rows alone, and not for the rows."""
    router, waits = RouterConfig(groups=1, experts=2 * ep_size, expert_size=F), Waits()
    executor = ExpertParallelExecutor(router, D, seed=0, layer=1, ep_size=ep_size, traffic=Traffic())
    executor.set_deepspeed_parallelism()
    x_ND, choices_NK = torch.randn(8, D, requires_grad=True), torch.arange(16).view(8, 2) % (2 * ep_size)
    with waits:
        executor(x_ND, choices_NK, torch.ones(8, 2)).sum().backward()
    assert not waits.found, waits.found


def main(ep_size: int) -> None:
    rank, ranks = init_distributed()
    check_waits(ep_size)

    @settings(max_examples=30, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(cases(ranks, ep_size))
    def check(case):
        worst = torch.tensor(difference(case, rank, ranks, ep_size), dtype=torch.float64)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        assert worst.item() < 1e-12, case

    check()


if __name__ == "__main__":
    main(int(sys.argv[1]))
