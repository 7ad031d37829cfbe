"""How long a collective takes: on a cluster of nodes, by given numbers; here, by measured ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from benchmarks.scaling_model.collectives import Collective, Group, Kind


class Fabric(Protocol):
    """What connects ranks."""

    def seconds(self, collective: Collective) -> float:
        """Of one call."""
        ...


@dataclass(frozen=True)
class Cluster:
    """Nodes of several GPUs, each GPU with its own network port; ranks are numbered node by node.

    Args:
        ranks_per_node: GPUs of a node.
        node_bandwidth: bytes/s that a GPU sends inside its node.
        network_bandwidth: bytes/s that a GPU sends to other nodes.
        node_latency: seconds of a message inside a node.
        network_latency: seconds of a message between nodes.
    """

    ranks_per_node: int
    node_bandwidth: float
    network_bandwidth: float
    node_latency: float
    network_latency: float

    def seconds(self, collective: Collective) -> float:
        """Of one call: what it sends over the bandwidth, and its messages' latencies."""
        here = self.members_per_node(collective.group)
        if collective.kind == "all_to_all":
            return self._all_to_all(collective, here)
        return self._ring(collective, here)

    def members_per_node(self, group: Group) -> int:
        """How many of a group's ranks lie on one node."""
        return max(1, min(group.ranks, self.ranks_per_node // group.stride))

    def _all_to_all(self, collective: Collective, here: int) -> float:
        """Each peer gets its equal part; parts for the node and for other nodes travel at the same time."""
        ranks = collective.group.ranks
        near, far = here - 1, ranks - here
        part = collective.sent / (ranks - 1)
        busy = max(near * part / self.node_bandwidth, far * part / self.network_bandwidth)
        return busy + near * self.node_latency + far * self.network_latency

    def _ring(self, collective: Collective, here: int) -> float:
        """Rings through all ports of a node at once; latencies as of a tree, up and down for an all-reduce."""
        nodes = math.ceil(collective.group.ranks / here)
        bandwidth = self.node_bandwidth if nodes == 1 else min(self.node_bandwidth, here * self.network_bandwidth)
        levels = math.ceil(math.log2(here)) * self.node_latency + math.ceil(math.log2(nodes)) * self.network_latency
        return collective.sent / bandwidth + (2 if collective.kind == "all_reduce" else 1) * levels


class Speed(NamedTuple):
    """A line through measured durations: seconds = latency + sent / bandwidth (bytes/s)."""

    latency: float
    bandwidth: float


def fit_speed(sent: Sequence[float], seconds: Sequence[float]) -> Speed:
    """The line with the least squares of relative errors, with no negative latency.

    Args:
        sent: bytes that a rank sent, at least two different values.
        seconds: how long it took, each above 0.
    """
    sent_N, seconds_N = np.asarray(sent, np.float64), np.asarray(seconds, np.float64)
    columns_N2 = np.stack([1 / seconds_N, sent_N / seconds_N], axis=1)
    scale_2 = np.linalg.norm(columns_N2, axis=0)
    latency, per_byte = np.linalg.lstsq(columns_N2 / scale_2, np.ones(len(seconds_N)), rcond=None)[0] / scale_2
    return Speed(max(float(latency), 0.0), 1 / max(float(per_byte), 1e-15))


@dataclass(frozen=True)
class Measured:
    """Ranks on this machine, whose collectives were timed.

    Args:
        speeds: by kind and number of ranks in the group, measured while all ranks of the run were at it.
    """

    speeds: dict[tuple[Kind, int], Speed]

    def seconds(self, collective: Collective) -> float:
        """Of one call, by the line measured for its kind and group.

        Raises:
            KeyError: nothing was measured for it.
        """
        speed = self.speeds[collective.kind, collective.group.ranks]
        return speed.latency + collective.sent / speed.bandwidth
