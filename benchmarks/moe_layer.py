"""The H-MoE layer against DeepSpeed's, and against the dense feed-forward that is its limit; forward and backward.

    python -m benchmarks.moe_layer

One layer of E experts of width 2 D, two per atom, on 8,192 atoms, in fp32 on one thread (`--device cuda`: in bf16).
Arms, in turns: a dense feed-forward of width 4 D, which has the active parameters of all others; ours; a flat gate on
our dispatcher; `deepspeed.moe.layer.MoE` with capacity factor 1.25, which drops atoms, and without drops. All arms send
the same atoms to the same experts: choices are written into the atoms' states, from which the gates read them. They are
balanced, or recorded from pretraining on real molecules (`recorded_routing.py`). Prints times over that of the dense
layer, medians of the rounds, and one JSON line, which goes to docs/results/moe_layer.json.

On the CPU glibc is told to keep the memory that tensors give back, for all arms alike, as torch does on a GPU.
Otherwise much of what is measured is the system clearing pages.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.recorded_routing import EXPERTS, GROUPS, Routing, balanced_routing, recorded_routing
from benchmarks.result import write_result
from hmoe_ds.config import RouterConfig
from hmoe_ds.moe.experts import GatedFeedForward, LocalExecutor
from hmoe_ds.moe.forms import ScaffoldRouting
from hmoe_ds.moe.layer import HMoELayer

WIDTHS = (128, 256, 512)
CHOICES, GATE_SIZE = 2, 64
# Time over the dense layer's; time of DeepSpeed's layer without drops over ours, when the fullest expert has more than
# UNEVEN times the mean load.
LIMIT, AHEAD, UNEVEN = 1.2, 1.5, 1.5
STOCK = ("stock 1.25", "stock no drop")


class Arm(NamedTuple):
    """A module, and how it is called with states [N, D]."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]


def tokens(routing: Routing, width: int) -> Tensor:
    """States [N, D] in whose first E entries the gates of all arms find the atoms' choices."""
    x_ND = 0.1 * torch.randn(len(routing.molecule_N), width, generator=torch.Generator().manual_seed(0))
    for choice, logit in enumerate((6.0, 5.0)):
        x_ND[torch.arange(len(x_ND)), routing.choices_NK[:, choice]] = logit
    return x_ND


def scaffold_routing(routing: Routing) -> ScaffoldRouting:
    """The scaffold gate's decision that leads to this routing."""
    logits_BG = 4.0 * nn.functional.one_hot(routing.group_B, routing.groups).float()
    log_p_BG = logits_BG.log_softmax(dim=1)
    z_B = logits_BG.logsumexp(dim=1)
    return ScaffoldRouting(logits_BG, log_p_BG, routing.group_B.unsqueeze(1), log_p_BG, z_B, readout_BD=logits_BG)


def hmoe_layer(
    form: Literal["hard", "flat"], routing: Routing, width: int, device: torch.device, dtype: torch.dtype
) -> Arm:
    """Our layer, without a shared expert."""
    router = RouterConfig(
        groups=routing.groups, experts=routing.experts, form=form, experts_per_atom=CHOICES, expert_size=2 * width,
        shared_size=0, gate_size=GATE_SIZE,
    )  # fmt: skip
    layer = HMoELayer(width, router, seed=0, layer=1, executor=LocalExecutor)
    with torch.no_grad():
        layer.gate.project.weight.copy_(torch.eye(GATE_SIZE, width))
        layer.gate.keys.copy_(torch.eye(routing.experts, GATE_SIZE))
    layer.to(device, dtype)
    scaffold = ScaffoldRouting(*(values.to(device) for values in scaffold_routing(routing)))
    molecule_N = routing.molecule_N.to(device)
    return Arm(layer, lambda x_ND: layer(x_ND, scaffold, molecule_N)[0])


def stock_layer(drops: bool, routing: Routing, width: int, device: torch.device, dtype: torch.dtype) -> Arm:
    """DeepSpeed's layer, with our expert."""
    from deepspeed.moe.layer import MoE  # not installed on every machine that has a GPU

    layer = MoE(
        width, GatedFeedForward(width, 2 * width), num_experts=routing.experts, k=CHOICES, capacity_factor=1.25,
        drop_tokens=drops, top2_2nd_expert_sampling=False,
    )  # fmt: skip
    layer.deepspeed_moe._set_ep_group(None)
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(torch.eye(routing.experts, width))
    layer.to(device, dtype)
    return Arm(layer, lambda x_ND: layer(x_ND)[0])


def arms(routing: Routing, width: int, device: torch.device, dtype: torch.dtype) -> dict[str, Arm]:
    """What is compared; DeepSpeed's layer where DeepSpeed is installed."""
    dense = GatedFeedForward(width, 4 * width).to(device, dtype)
    made = {
        "dense": Arm(dense, dense),
        "ours": hmoe_layer("hard", routing, width, device, dtype),
        "flat": hmoe_layer("flat", routing, width, device, dtype),
    }
    if find_spec("deepspeed"):
        stock = {name: stock_layer(name == STOCK[0], routing, width, device, dtype) for name in STOCK}
        made |= stock
    return made


def seconds(arm: Arm, x_ND: Tensor, repeats: int) -> float:
    """Time of a forward and a backward that makes new gradients."""
    grad_ND = torch.ones_like(x_ND)
    _wait(x_ND)
    started = time.perf_counter()
    for _ in range(repeats):
        x_ND.grad = None
        arm.module.zero_grad()
        arm.forward(x_ND).backward(grad_ND)
    _wait(x_ND)
    return (time.perf_counter() - started) / repeats


def _wait(x_ND: Tensor) -> None:
    if x_ND.is_cuda:
        torch.cuda.synchronize(x_ND.device)


def measure(routing: Routing, width: int, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Median seconds of each arm over rounds in which all take their turns."""
    x_ND = tokens(routing, width).to(device, dtype).requires_grad_()
    compared = arms(routing, width, device, dtype)
    repeats = 20 if x_ND.is_cuda else 1
    times: dict[str, list[float]] = {name: [] for name in compared}
    for number in range(rounds + 1):
        for name, arm in compared.items():
            took = seconds(arm, x_ND, repeats)
            if number:  # the first round warms up
                times[name].append(took)
    return {name: median(values) for name, values in times.items()}


def cell(kind: str, experts: int, width: int, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    routing = balanced_routing(experts) if kind == "balanced" else recorded_routing(experts)
    times = measure(routing, width, device, dtype, rounds)
    # Three products of D x 4 D, each once in the forward and twice in the backward.
    flops = 3 * 3 * 2 * len(routing.molecule_N) * width * 4 * width
    return {
        "routing": kind,
        "experts": experts,
        "width": width,
        "load_max_over_mean": routing.imbalance,
        "over_dense": {name: took / times["dense"] for name, took in times.items()},
        "tera_flops": {name: flops / took / 1e12 for name, took in times.items()},
    }


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that have targets, of the worst cell each."""
    ours = [found["over_dense"]["ours"] for found in cells]
    result: dict[str, Any] = {"ratio": max(ours), "target": LIMIT, "cells_within_target": sum(r <= LIMIT for r in ours)}
    if STOCK[0] in cells[0]["over_dense"]:
        ahead = [{name: found["over_dense"][name] / found["over_dense"]["ours"] for name in STOCK} for found in cells]
        uneven = [a[STOCK[1]] for a, found in zip(ahead, cells, strict=True) if found["load_max_over_mean"] > UNEVEN]
        result |= {
            "least_ahead_of_stock": min(min(found.values()) for found in ahead),
            "least_ahead_of_stock_no_drop_uneven": min(uneven, default=None),
            "target_ahead_of_stock_no_drop_uneven": AHEAD,
        }
    return result


def keep_memory() -> None:
    """Make glibc take all memory from its heap and keep it."""
    libc, trim_threshold, mmap_max = ctypes.CDLL("libc.so.6"), -1, -4
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_max, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cells = []
    for kind in ("balanced", "real"):
        for experts in options.experts:
            for width in options.widths:
                found = cell(kind, experts, width, device, dtype, options.rounds)
                cells.append(found)
                shown = "".join(f"  {name} {value:5.2f}" for name, value in found["over_dense"].items())
                print(
                    f"{kind:<9} E {experts:<3} D {width:<4} max/mean {found['load_max_over_mean']:5.2f}{shown}",
                    flush=True,
                )
    name = "moe_layer" if device.type == "cpu" else "moe_layer_gpu"
    on = {} if device.type == "cpu" else {"device": torch.cuda.get_device_name(device)}
    write_result({"name": name, **on, **summary(cells), "groups": GROUPS, "atoms": 8192, "cells": cells})


if __name__ == "__main__":
    main()
