"""Two ranks on this machine that speak to each other, for real."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hmoe_ds.doctor.finding import Finding, ok, problem
from hmoe_ds.doctor.probe import Probe, ProbeError

RANKS = 2
_MENDS = {
    "gloo": "export GLOO_SOCKET_IFNAME=lo for one machine; a firewall must let local connections pass",
    "nccl": "NCCL_DEBUG=INFO says more; try NCCL_P2P_DISABLE=1, NCCL_SOCKET_IFNAME=lo, and a larger /dev/shm",
}


@contextlib.contextmanager
def started_ranks(backend: str) -> Iterator[list[Probe]]:
    """Ranks that are ended with this context; `backend`: "gloo" or "nccl", one GPU each."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        meeting = str(Path(folder) / "meeting")
        yield [
            stack.enter_context(Probe("rank_probe", backend, str(rank), str(RANKS), meeting)) for rank in range(RANKS)
        ]


def check_ranks(backend: str, ranks: list[Probe], seconds: float) -> Finding:
    """Whether ranks that were started have understood each other, for which they have `seconds`."""
    for rank in ranks:
        try:
            rank.answer(seconds)
        except ProbeError as error:
            return problem(f"{RANKS} ranks, {backend}", str(error), "all_reduce and all_to_all", _MENDS[backend])
    return ok(f"{RANKS} ranks, {backend}", "all_reduce and all_to_all work on this machine")
