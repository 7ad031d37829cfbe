"""Ranks that make the runs of `worlds.py`: `python -m benchmarks.scaling_model.ranks JSON`.

They are forked from one process that has imported DeepSpeed: to import it on every rank of every run took most of the
time of this benchmark.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from benchmarks.scaling_model.worlds import World
from hmoe_ds.config_parser import load_config
from hmoe_ds.training.engine import init_distributed
from hmoe_ds.training.launching.node import free_port
from hmoe_ds.training.loop import train


def pretrain(world: World, rank: int, port: int) -> None:
    """Be this rank of a world, and make its runs."""
    if world.core is not None:
        os.sched_setaffinity(0, {world.core})
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world.ranks, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
    init_distributed()
    for folder, words in world.runs.items():
        train(load_config([*words, f"--run.out={folder}"]), rank, world.ranks)


def wait_for(ranks: set[int]) -> None:
    """Wait for these processes; when one fails, end the others."""
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(f"a rank failed: exit code {os.waitstatus_to_exitcode(status)}")


def main() -> None:
    for stage in json.loads(sys.argv[1]):
        ranks = set()
        for world in (World(**fields) for fields in stage):
            port = free_port()
            for rank in range(world.ranks if world.runs else 0):
                pid = os.fork()
                if pid == 0:
                    pretrain(world, rank, port)
                    return
                ranks.add(pid)
        wait_for(ranks)


if __name__ == "__main__":
    main()
