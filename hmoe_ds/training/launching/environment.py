"""The environment that ranks start with: the one place with its defaults. What the user has set stays.

Imports no torch, which reads some of it when it is loaded.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import psutil

# How torch's gloo and NVIDIA's NCCL are told which network interface to use. NCCL would take eth10 for eth1, too.
_INTERFACE_VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}
# Of a block that nobody owns. Nothing is sent to it.
_ELSEWHERE = "192.0.2.1"


def rank_environment(ranks: int, gpus: bool, given: Mapping[str, str]) -> dict[str, str]:
    """The environment of ranks on this machine: `given`, and defaults for what is not in it.

    Args:
        ranks: on this machine.
        gpus: whether this machine has any.
        given: environment that the user has set.
    """
    defaults = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))}
    if not gpus:
        # Torch then asks for huge pages: a step allocates all its activations anew, and small pages cost it a tenth.
        defaults |= {"DS_ACCELERATOR": "cpu", "THP_MEM_ALLOC_ENABLE": "1"}
    return {**defaults, **given}


def network_environment(master: str, given: Mapping[str, str]) -> dict[str, str]:
    """Names the network interface for ranks on several machines, as far as `given` does not.

    Without that gloo listens at the address of this machine's own name, which on Debian is a loopback one.

    Args:
        master: machine of rank 0.
        given: environment that the user has set.
    """
    interface = interface_towards(master)
    if interface is None:
        return {}
    return {name: form.format(interface) for name, form in _INTERFACE_VARIABLES.items() if name not in given}


def interface_towards(host: str) -> str | None:
    """The interface by which this machine reaches `host`, or others if that is itself; None where that is unclear."""
    for target in (host, _ELSEWHERE):
        interface = _interface_of(_own_address(target))
        if interface is not None:
            return interface
    others = [name for name, state in psutil.net_if_stats().items() if state.isup and name != "lo"]
    return others[0] if len(others) == 1 else None


def _own_address(target: str) -> str | None:
    """The address that this machine would send from."""
    try:
        family, kind, *_, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of a datagram socket: looks up the route, and sends nothing
            return probe.getsockname()[0]
    except OSError:  # unknown, or no route
        return None


def _interface_of(address: str | None) -> str | None:
    for name, entries in psutil.net_if_addrs().items():
        if name != "lo" and any(entry.address == address for entry in entries):
            return name
    return None
