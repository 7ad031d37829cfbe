"""Where the ranks of a run are started: on this machine, on this one and its like, or on the hosts of a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from hmoe_ds.config import ConfigError, RunConfig
from hmoe_ds.training.checks.preflight import check_run
from hmoe_ds.training.launch import Command
from hmoe_ds.training.launching.hostfile import read_hostfile
from hmoe_ds.training.launching.hosts import Hosts, hosts_command, launch_on_hosts
from hmoe_ds.training.launching.node import MASTER_PORT, Node, gpu_count, launch_here, node_command


@dataclasses.dataclass(frozen=True)
class StartOptions:
    """What a user says about it. None: nothing.

    Args:
        num_ranks: on each machine.
        hostfile: machines to reach over ssh.
        launcher: for these.
        nodes: machines on each of which the same command is started.
        node_rank: number of this one.
        master_addr: name or address of machine 0.
        master_port: a port there.
    """

    num_ranks: int | None
    hostfile: Path | None
    launcher: str | None
    nodes: int
    node_rank: int | None
    master_addr: str | None
    master_port: int | None


Placement = Hosts | Node


def place(options: StartOptions, ep_size: int, dry: bool = False) -> Placement:
    """Where the ranks of a run are to be.

    Args:
        options: of the user.
        ep_size: ranks that the experts are spread over.
        dry: this machine is not the one that they would run on.

    Raises:
        ConfigError: options that do not go together.
    """
    if options.hostfile is not None:
        return _place_on_hosts(options, options.hostfile)
    if options.launcher is not None:
        raise ConfigError(f"--launcher {options.launcher} is for --hostfile, which is not given")
    node = _node(options)
    spread = max(1, ep_size // node.nodes)
    return node._replace(ranks=options.num_ranks or (spread if dry else gpu_count() or spread))


def _place_on_hosts(options: StartOptions, hostfile: Path) -> Hosts:
    for name in ("num_ranks", "node_rank", "master_port"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} does not go with --hostfile, whose `slots` say how many ranks each host has")
    if options.nodes > 1:
        raise ConfigError("--nodes does not go with --hostfile, which names the machines")
    return Hosts(hostfile, read_hostfile(hostfile), options.launcher or "pdsh", options.master_addr)


def _node(options: StartOptions) -> Node:
    """This machine, with no ranks yet."""
    number, master, nodes = options.node_rank, options.master_addr, options.nodes
    if nodes == 1:
        if number:
            raise ConfigError(f"--node_rank is {number}, but --nodes is 1: say how many machines there are")
        return Node(0)  # wherever the master is said to be
    if number is None or number >= nodes:
        raise ConfigError(f"--nodes is {nodes}, --node_rank {number}: machines have the numbers 0 to {nodes - 1}")
    if master is None:
        raise ConfigError(f"--nodes is {nodes}, but --master_addr is not given: name machine 0, as the others reach it")
    return Node(0, nodes, number, master, options.master_port or MASTER_PORT)


def check_placed(config: RunConfig, placement: Placement) -> None:
    """Raise UsageError, mostly a ConfigError, if `config` cannot run so, as far as this machine can tell."""
    if isinstance(placement, Node):
        check_run(config, placement.all_ranks, placement.ranks)
    else:  # ranks look at the memory of their machines themselves
        unchecked = dataclasses.replace(config, run=dataclasses.replace(config.run, check_memory=False))
        check_run(unchecked, placement.all_ranks)


def command_of(argv: Sequence[str], placement: Placement, out: Path) -> Command:
    """The command that `start` runs first."""
    return node_command(argv, placement) if isinstance(placement, Node) else hosts_command(placement, out)


def start(argv: Sequence[str], placement: Placement, out: Path, restarts: int) -> int:
    """Run the training loop with arguments `argv`; -> its exit code, 128 + n after SIGINT."""
    if isinstance(placement, Node):
        return launch_here(argv, placement, out, restarts)
    return launch_on_hosts(argv, placement, out, restarts)
