"""Starts the ranks of this machine, the only one of a run or one of several, through DeepSpeed's launcher."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hmoe_ds.config import ConfigError
from hmoe_ds.training.launch import Command, Launcher
from hmoe_ds.training.launching.environment import network_environment, rank_environment
from hmoe_ds.training.launching.supervisor import is_supervised
from hmoe_ds.training.outcome import forget_outcome
from hmoe_ds.training.stopping.stop_file import STOP_FILE

LAUNCHER, LOOP = "hmoe_ds.training.launching.deepspeed_launcher", "hmoe_ds.training.loop"
MASTER_PORT = 29500
_FREE_PORTS = range(20000, 29000)  # Linux gives those from 32768 on to outgoing connections


class Node(NamedTuple):
    """The place of this machine in a run on `nodes` of them, with equally many ranks on each.

    Attributes:
        ranks: on each machine.
        nodes: machines.
        number: of this one, from 0.
        master: name or address of machine 0.
        port: where ranks find each other there; 0: a free one, which only one machine alone can choose.
    """

    ranks: int
    nodes: int = 1
    number: int = 0
    master: str = "127.0.0.1"
    port: int = 0

    @property
    def all_ranks(self) -> int:
        """Of the run."""
        return self.nodes * self.ranks


def launch_here(argv: Sequence[str], node: Node, out: Path, restarts: int) -> int:
    """Run the training loop with arguments `argv` on this machine; -> its exit code, 128 + n after SIGINT.

    On one of several machines there is one attempt: the next one has to be made on all of them.

    Args:
        argv: of the loop.
        node: this machine.
        out: the run's folder.
        restarts: restarts in a row without a new checkpoint after which it gives up.

    Raises:
        ConfigError: fewer GPUs than ranks, on a machine with GPUs.
    """
    gpus = gpu_count()
    if 0 < gpus < node.ranks:
        raise ConfigError(
            f"--num_ranks is {node.ranks}, but this machine has {gpus} GPUs: start at most {gpus} ranks here"
        )
    with Launcher(out) as launcher:
        if node.nodes == 1:
            # Another port for each attempt, as that of the one before may still be in use.
            return launcher.run(lambda: node_command(argv, node._replace(port=free_port())), restarts)
        if node.number == 0 and not is_supervised():
            forget_outcome(out)
            (out / STOP_FILE).unlink(missing_ok=True)
        return launcher.run_part(node_command(argv, node))


def gpu_count() -> int:
    """GPUs that torch sees here."""
    import torch  # here, because it takes seconds, which a mistake in the configuration need not cost

    return torch.cuda.device_count()


def free_port() -> int:
    """A TCP port that nobody listens on now, and that no outgoing connection takes until the ranks listen there.

    Raises OSError when there is none.
    """
    for port in random.SystemRandom().sample(_FREE_PORTS, len(_FREE_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"all of the ports {_FREE_PORTS.start} to {_FREE_PORTS.stop - 1} of this machine are taken")


def node_command(argv: Sequence[str], node: Node) -> Command:
    """The command that starts the ranks of this machine."""
    gpus = gpu_count()
    devices = _devices(node.ranks, gpus)
    world = json.dumps({f"node{number}": devices for number in range(node.nodes)}).encode()
    words = [
        *(sys.executable, "-u", "-m", LAUNCHER, f"--node_rank={node.number}"),
        *(f"--world_info={base64.urlsafe_b64encode(world).decode()}", f"--master_addr={node.master}"),
        *(f"--master_port={node.port}", "--no_local_rank", "--log_level=error", "--module", LOOP, *argv),
    ]
    network = network_environment(node.master, os.environ) if node.nodes > 1 else {}
    return Command(words, rank_environment(node.ranks, gpus > 0, os.environ | network))


def _devices(ranks: int, gpus: int) -> Sequence[int | str]:
    """GPUs of the ranks. DeepSpeed's launcher would take others than those that CUDA_VISIBLE_DEVICES names."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not gpus or not visible:
        return list(range(ranks))
    return [name.strip() for name in visible.split(",")][:ranks]
