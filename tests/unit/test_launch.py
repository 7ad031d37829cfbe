"""What ranks find in their environment, and whom they meet."""

import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import PipelineError
from hmoe_ds.training.engine import _join
from hmoe_ds.training.launching.environment import rank_environment
from hmoe_ds.training.launching.node import free_port


def test_ranks_on_a_cpu_are_told_so_and_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    found = rank_environment(ranks=3, gpus=False, given={})
    assert (found["OMP_NUM_THREADS"], found["DS_ACCELERATOR"], found["THP_MEM_ALLOC_ENABLE"]) == ("2", "cpu", "1")
    with_gpus = rank_environment(ranks=3, gpus=True, given={})
    assert not with_gpus.keys() & {"DS_ACCELERATOR", "THP_MEM_ALLOC_ENABLE"}


def test_what_the_user_has_set_stays():
    given = {"OMP_NUM_THREADS": "5", "THP_MEM_ALLOC_ENABLE": "0", "OTHER": "1"}
    assert rank_environment(ranks=2, gpus=False, given=given) == {**given, "DS_ACCELERATOR": "cpu"}


def test_a_rank_that_meets_those_of_the_attempt_before(monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(store.port))):
        monkeypatch.setenv(name, value)
    patience = timedelta(seconds=10)
    _join(patience)
    with pytest.raises(PipelineError, match="waits for the rank 1 of an attempt that has failed; start again"):
        _join(patience)
    monkeypatch.setenv("RANK", "2")
    _join(patience)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun keeps the store
    _join(patience)


def test_a_port_stays_free_of_outgoing_connections():
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40
    assert not any(first <= port <= last for port in ports)


def test_a_port_that_somebody_listens_on_is_not_given(monkeypatch):
    with socket.create_server(("127.0.0.1", free_port())) as server:
        taken, other = server.getsockname()[1], free_port()
        monkeypatch.setattr("random.SystemRandom.sample", lambda *_: [taken, other])
        assert free_port() == other
