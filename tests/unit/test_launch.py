"""What ranks find in their environment."""

import pytest

from hmoe_ds.training.launch import _environment


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.delenv(name, raising=False)


def test_ranks_on_a_cpu_are_told_so_and_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    found = _environment(ranks=3, gpus=0)
    assert (found["OMP_NUM_THREADS"], found["DS_ACCELERATOR"], found["THP_MEM_ALLOC_ENABLE"]) == ("2", "cpu", "1")
    with_gpus = _environment(ranks=3, gpus=3)
    assert not with_gpus.keys() & {"DS_ACCELERATOR", "THP_MEM_ALLOC_ENABLE"}


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    found = _environment(ranks=2, gpus=0)
    assert (found["OMP_NUM_THREADS"], found["THP_MEM_ALLOC_ENABLE"]) == ("5", "0")
