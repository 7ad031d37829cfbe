"""Two hosts, reached over ssh: DeepSpeed's launcher starts a rank on each, and the experts are spread over both."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hmoe_ds.training import exit_codes
from tests.cluster.machines import Cluster, require
from tests.distributed.harness import ROOT, arguments, train
from tests.faults.processes import check_same, steps_logged, wait_until

pytestmark = pytest.mark.timeout(600)
SECRET = "hushHUSH0815"
LONG = {"run__steps": 60, "run__checkpoint_every": 10, "parallel__ep_size": 2, "run__hang_seconds": 15}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    require("pdsh", "sshd", "ip", "nsenter")
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """The same run on one host."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out, dataset, ranks=2, **LONG)
    return out


class Started:
    """`hmoe pretrain` on node0, with ranks on the hosts."""

    def __init__(self, cluster: Cluster, out: Path, dataset: Path, *options: str, **changes) -> None:
        self.out, self._cluster, self.log = out, cluster, out.parent / "log"
        command = [sys.executable, "-m", "hmoe_ds.cli", "pretrain", "--hostfile", str(cluster.hostfile), *options]
        secret = {"MLFLOW_TRACKING_PASSWORD": SECRET, "PYTHONUNBUFFERED": "1"}
        with self.log.open("a") as log:
            self.process = cluster.machines["node0"].start(
                [*command, *arguments(out, dataset, **LONG | changes)],
                cwd=ROOT, env=os.environ | secret, stdout=log, stderr=log,
            )  # fmt: skip

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: steps_logged(self.out) >= step or self.process.poll() is not None, f"step {step}", 200)
        assert self.process.poll() is None, self.said()

    def ended(self, seconds: float = 200) -> int:
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not ended in {seconds} s: {self.said()[-6000:]}")

    def said(self) -> str:
        return self.log.read_text()

    def signal(self, number: int) -> None:
        """To the command itself, whose parent is not in its namespace."""
        [line] = [line for line in self._cluster.machines["node0"].command_lines() if "hmoe_ds.cli pretrain" in line]
        self._cluster.machines["node0"].run(["kill", f"-{number}", line.split()[0]])


def ranks_on(cluster: Cluster) -> list[str]:
    hosts = (cluster.machines["node1"], cluster.machines["node2"])
    return [line for host in hosts for line in host.command_lines() if "hmoe_ds" in line or "deepspeed" in line]


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_experts_on_two_hosts_give_the_run_of_one(launcher, cluster, whole, dataset, tmp_path, monkeypatch):
    if launcher == "openmpi":
        require("mpirun")
        for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
            monkeypatch.setenv(name, "1")
    out = tmp_path / 'it\'s "a" $HOME run; %h' / "run"
    out.parent.mkdir()
    started = Started(cluster, out, dataset, f"--launcher={launcher}")
    started.wait_for_step(5)
    assert len([line for line in ranks_on(cluster) if "start_rank" in line]) >= 2
    everywhere = [line for machine in cluster.machines.values() for line in machine.command_lines()]
    assert not [line for line in everywhere if SECRET in line]
    assert (out / "start.json").stat().st_mode & 0o077 == 0
    assert started.ended() == exit_codes.DONE, started.said()[-6000:]
    assert not (out / "start.json").exists()
    assert not ranks_on(cluster)
    check_same(out, whole, tmp_path)


def test_a_host_that_is_lost_and_comes_back(cluster, whole, dataset, tmp_path):
    """The command waits for it, and then goes on."""
    out = tmp_path / "run"
    started = Started(cluster, out, dataset, "--restarts=1")
    started.wait_for_step(15)
    cluster.machines["node2"].kill()
    wait_until(lambda: "host node2 does not answer over ssh" in started.said(), "the host is missed", 60)
    assert not [line for line in cluster.machines["node1"].command_lines() if "hmoe_ds" in line]
    assert 15 <= steps_logged(out) < 60
    cluster.boot(2)
    assert started.ended() == exit_codes.DONE, started.said()[-6000:]
    assert "restart 1 of 1" in started.said()
    check_same(out, whole, tmp_path)


def test_two_commands_for_one_run(cluster, whole, dataset, tmp_path):
    """The second one ends, and does the first no harm."""
    out = tmp_path / "run"
    started = Started(cluster, out, dataset)
    started.wait_for_step(5)
    for code in (exit_codes.FAILED, exit_codes.USAGE):
        if code == exit_codes.USAGE:
            cluster.hostfile.rename(cluster.folder / "away")
        second = Started(cluster, out, dataset)
        assert second.ended(60) == code, second.said()[-3000:]
    (cluster.folder / "away").rename(cluster.hostfile)
    assert "is being trained by another start" in second.said()
    assert started.ended() == exit_codes.DONE, started.said()[-6000:]
    check_same(out, whole, tmp_path)


def test_a_cut_cable_that_is_mended(cluster, whole, dataset, tmp_path):
    """One command survives it."""
    out = tmp_path / "run"
    started = Started(cluster, out, dataset, "--restarts=5")
    started.wait_for_step(15)
    cluster.cut(2)
    try:
        wait_until(lambda: "it is started again" in started.said(), "it ends", 150)
        wait_until(lambda: "host node2 does not answer over ssh" in started.said(), "the host is missed", 60)
    finally:
        cluster.cut(2, up=True)
    assert started.ended() == exit_codes.DONE, started.said()[-6000:]
    assert re.search(r"no progress for 15 s at step \d+", started.said())
    check_same(out, whole, tmp_path)


def test_a_run_that_is_asked_to_stop_and_one_that_is_interrupted(cluster, whole, dataset, tmp_path):
    out = tmp_path / "run"
    started = Started(cluster, out, dataset)
    started.wait_for_step(15)
    started.signal(signal.SIGTERM)
    assert started.ended(60) == exit_codes.REQUEUE, started.said()[-6000:]
    stopped = re.search(r"stopped after step (\d+) of 60, as it was asked to", started.said())
    assert (out / "checkpoints" / f"step{int(stopped[1]):08d}").is_dir()
    assert not ranks_on(cluster)

    started = Started(cluster, out, dataset)
    started.wait_for_step(int(stopped[1]) + 5)
    started.signal(signal.SIGINT)
    assert started.ended(60) == 128 + signal.SIGINT, started.said()[-6000:]
    wait_until(lambda: not ranks_on(cluster), "all ranks have noticed", 30)

    started = Started(cluster, out, dataset)
    assert started.ended() == exit_codes.DONE, started.said()[-6000:]
    check_same(out, whole, tmp_path)


def test_the_machine_that_started_it_is_lost(cluster, dataset, tmp_path):
    """No rank is left on the others."""
    started = Started(cluster, tmp_path / "run", dataset, run__steps=100_000)
    started.wait_for_step(15)
    cluster.machines["node0"].kill()
    try:
        wait_until(lambda: not ranks_on(cluster), "all ranks have ended", 60)
    finally:
        cluster.boot(0)


def test_a_folder_that_only_one_machine_has(cluster, dataset, tmp_path):
    node0 = cluster.machines["node0"]
    own = tmp_path / "own"
    own.mkdir()
    node0.run(["mount", "-t", "tmpfs", "tmpfs", str(own)])
    started = Started(cluster, own / "run", dataset)
    started_log = started.log
    assert started.ended(60) == exit_codes.USAGE
    assert "put run.out on a file system that all hosts share" in started_log.read_text()


def test_one_command_on_each_host(cluster, whole, dataset, tmp_path):
    """As Slurm and Kubernetes start it."""
    out, processes = tmp_path / "run", []
    for number in (1, 0):
        place = ["--nodes=2", f"--node_rank={number}", "--master_addr=node1", "--num_ranks=1"]
        command = [sys.executable, "-m", "hmoe_ds.cli", "pretrain", *place, *arguments(out, dataset, **LONG)]
        with (tmp_path / f"log{number}").open("w") as log:
            machine = cluster.machines[f"node{number + 1}"]
            processes.append(machine.start(command, cwd=ROOT, stdout=log, stderr=log))
    codes = [process.wait(timeout=200) for process in processes]
    assert codes == [0, 0], [(tmp_path / f"log{number}").read_text()[-3000:] for number in range(2)]
    check_same(out, whole, tmp_path)
