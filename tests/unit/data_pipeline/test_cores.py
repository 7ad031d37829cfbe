"""Cores that this process may use: what `hmoe doctor` tells, and commands have workers for."""

import sys

import pytest

from data_pipeline.execution import cores
from data_pipeline.execution.cores import cpu_quota
from hmoe_ds.cli import _parse
from hmoe_ds.doctor.host import check_host


@pytest.mark.parametrize(("content", "count"), [("max 100000", sys.maxsize), ("450000 100000", 4), ("50000 100000", 1)])
def test_the_quota_of_a_container_counts_as_cores(tmp_path, content, count):
    assert cpu_quota(tmp_path) == sys.maxsize
    (tmp_path / "cpu.max").write_text(content + "\n")
    assert cpu_quota(tmp_path) == count


@pytest.mark.parametrize(("affinity", "quota", "usable"), [(5, 64, 5), (64, 3, 3)])
def test_workers_are_as_many_as_cores_that_may_be_used(affinity, quota, usable, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(affinity)))
    monkeypatch.setattr(cores, "cpu_quota", lambda cgroup: quota)
    for words in (["prepare", "a.smi"], ["embed", "model", "a.smi"], ["predict", "predictor", "a.smi"]):
        assert _parse([*words, "--out", "x"])[1].workers == usable
    assert next(iter(check_host({}))).found.startswith(f"{usable} of 64 usable")
