"""How fast this machine's ranks exchange bytes over gloo, and update parameters.

`python -m benchmarks.scaling_model.speeds FILE`, once for each rank, with the environment of `torch.distributed`.
Rank 0 writes FILE: a JSON list of {"kind", "ranks", "bandwidth", "latency"}, measured while all ranks are at it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.scaling_model.collectives import Kind, ring_bytes
from benchmarks.scaling_model.fabric import Speed, fit_speed

_SIZES = (4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
_KINDS: tuple[Kind, ...] = ("all_to_all", "all_reduce", "all_gather")
_CALLS = 15


def measure_speed(kind: Kind, group: dist.ProcessGroup) -> Speed:
    """Speed of one kind of collective in `group`; all ranks of the world must do the same."""
    ranks = dist.get_world_size(group)
    sent = [ring_bytes(kind, size, ranks) for size in _SIZES]
    return fit_speed(sent, [_seconds(_call(kind, size, group)) for size in _SIZES])


def _call(kind: Kind, size: int, group: dist.ProcessGroup) -> Callable[[], object]:
    """The collective on a buffer of `size` bytes."""
    values = torch.zeros(size // 4)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(values, group=group)
    if kind == "all_to_all":
        received = torch.empty_like(values)
        return lambda: dist.all_to_all_single(received, values, group=group)
    shards: list[Tensor] = list(values.chunk(dist.get_world_size(group)))
    own = torch.zeros_like(shards[dist.get_rank(group)])
    return lambda: dist.all_gather(shards, own, group=group)


def _seconds(call: Callable[[], object]) -> float:
    """Median over calls, each after all ranks have met."""
    durations = []
    for _ in range(_CALLS):
        dist.barrier()
        started = time.perf_counter()
        call()
        durations.append(time.perf_counter() - started)
    return median(durations[2:])


def update_seconds_per_parameter(parameters: int = 1 << 20) -> float:
    """Seconds of AdamW for one fp32 parameter, on one core."""
    torch.set_num_threads(1)
    weight = torch.nn.Parameter(torch.zeros(parameters))
    weight.grad = torch.ones(parameters)
    optimizer = torch.optim.AdamW([weight])
    durations = []
    for _ in range(_CALLS):
        started = time.process_time()  # other work on the machine does not count
        optimizer.step()
        durations.append(time.process_time() - started)
    return median(durations[2:]) / parameters


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = []
    for size in [size for size in (2, 4) if size <= ranks]:
        # Every rank must take part in the making of every group.
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, ranks, size)]
        for kind in _KINDS:
            speed = measure_speed(kind, groups[rank // size])
            found.append({"kind": kind, "ranks": size, **speed._asdict()})
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
