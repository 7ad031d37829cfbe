"""Two nodes of a real Slurm: batch scripts that are run, queued again, preempted, and that lose a worker."""

import os
import re
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.machines import Machine, require
from tests.cluster.test_hosts import LONG
from tests.distributed.harness import ROOT, train
from tests.faults.processes import check_same, steps_logged, wait_until

pytestmark = pytest.mark.timeout(600)
BIN = Path(sys.executable).parent


class Slurm:
    """A controller and two nodes, in namespaces of their own; in a context."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        configuration = (Path(__file__).parent / "slurm.conf").read_text().format(folder=folder)
        (folder / "slurm.conf").write_text(configuration)
        (folder / "state").mkdir()
        self._environment = os.environ | {
            "PATH": f"{BIN}:/usr/sbin:{os.environ['PATH']}",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "RESTARTS": "1",
        }

    def __enter__(self) -> "Slurm":
        self.machine = Machine("slurm", self._folder, {"n1": "127.0.0.1", "n2": "127.0.0.1"})
        # Slurm does not start where there is but a loopback interface.
        self.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "nowhere")
        self.run("ip", "address", "add", "10.77.0.10/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        folder = self._folder
        (folder / "munge.key").write_bytes(os.urandom(64))
        (folder / "munge.key").chmod(0o400)
        files = [
            f"--{name}={folder}/munge.{name.split('-')[0]}"
            for name in ("key-file", "pid-file", "log-file", "seed-file")
        ]
        self.run("munged", "--force", f"--socket={folder}/munge.sock", *files)
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
            with (folder / f"{'-'.join(command)}.log").open("w") as log:
                self.machine.start(command, env=self._environment, stdout=log, stderr=log)
        wait_until(
            lambda: self._ask("sinfo", "-hN", "--partition=low", "-o", "%T").split() == ["idle"] * 2,
            "both nodes are there",
            60,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.machine.kill()

    def run(self, *command: str) -> str:
        return self.machine.run(list(command), env=self._environment)

    def _ask(self, *command: str) -> str:
        """What may not answer yet."""
        try:
            return self.run(*command)
        except AssertionError:
            return ""

    def submit(self, log: Path, *words: str) -> str:
        """-> the job."""
        options = ["--parsable", "--time=10", f"--output={log}", f"--chdir={ROOT}"]
        return self.run("sbatch", *options, *words).strip()

    def state(self, job: str) -> str:
        return re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))[1]

    def wait_for(self, job: str, state: str, log: Path, seconds: float = 200) -> None:
        ends = {state, "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        wait_until(lambda: self.state(job) in ends, f"job {job} is {state}", seconds)
        assert self.state(job) == state, log.read_text()[-6000:]

    def start_now(self, job: str) -> None:
        """A job that was queued again would wait for two minutes."""
        time.sleep(3)  # within the second, nodes would take its new credential for the one that was revoked
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    require("sbatch", "slurmctld", "slurmd", "munged")
    with Slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """The same run without Slurm."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out, dataset, ranks=2, **LONG)
    return out


def wait_for_step(slurm: Slurm, job: str, out: Path, step: int, log: Path) -> None:
    wait_until(lambda: steps_logged(out) >= step or slurm.state(job) in ("FAILED", "COMPLETED"), f"step {step}", 200)
    assert slurm.state(job) == "RUNNING", log.read_text()[-6000:]


def pretrain(slurm: Slurm, whole: Path, dataset: Path, out: Path, log: Path, *options: str) -> str:
    script = [str(ROOT / "launchers" / "pretrain.sbatch"), str(whole / "config.yaml"), str(dataset), str(out)]
    return slurm.submit(log, *options, *script)


def test_a_job_that_is_queued_again_before_its_time_is_over(slurm, whole, dataset, tmp_path):
    out, log = tmp_path / "it's a run" / "run", tmp_path / "log"
    job = pretrain(slurm, whole, dataset, out, log)
    wait_for_step(slurm, job, out, 15, log)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 does
    slurm.wait_for(job, "PENDING", log, 60)
    stopped = re.search(r"stopped after step (\d+) of 60, as it was asked to", log.read_text())
    assert (out / "checkpoints" / f"step{int(stopped[1]):08d}").is_dir()
    slurm.start_now(job)
    slurm.wait_for(job, "COMPLETED", log)
    check_same(out, whole, tmp_path)


def test_a_job_that_is_preempted(slurm, whole, dataset, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    job = pretrain(slurm, whole, dataset, out, log, "--partition=low")
    wait_for_step(slurm, job, out, 15, log)
    other = slurm.submit(tmp_path / "other", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    slurm.wait_for(other, "COMPLETED", log, 100)
    assert "stopped after step" in log.read_text()
    slurm.wait_for(job, "PENDING", log, 60)
    slurm.start_now(job)
    slurm.wait_for(job, "COMPLETED", log)
    check_same(out, whole, tmp_path)


def test_a_rank_that_is_killed(slurm, whole, dataset, tmp_path):
    """Whatever Slurm then does to the others: the same job goes on."""
    out, log = tmp_path / "run", tmp_path / "log"
    job = pretrain(slurm, whole, dataset, out, log, "--ntasks-per-node=2", "--overcommit")
    wait_for_step(slurm, job, out, 15, log)
    lines = slurm.machine.command_lines()
    ranks = [line.split()[0] for line in lines if "-u -m hmoe_ds.training.loop" in line and str(out) in line]
    slurm.run("kill", "-9", ranks[-1])
    slurm.wait_for(job, "COMPLETED", log)
    assert "restart 1 of 1" in log.read_text()
    check_same(out, whole, tmp_path)


def test_a_job_that_is_cancelled_stays_so(slurm, whole, dataset, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    job = pretrain(slurm, whole, dataset, out, log)
    wait_for_step(slurm, job, out, 15, log)
    slurm.run("scancel", job)
    wait_until(lambda: slurm.state(job) == "CANCELLED", "it is cancelled", 60)
    wait_until(lambda: not [line for line in slurm.machine.command_lines() if "hmoe" in line], "all have ended", 60)
    assert slurm.state(job) == "CANCELLED"


def test_a_mistake_fails_the_job_at_once(slurm, whole, dataset, tmp_path):
    log = tmp_path / "log"
    job = pretrain(slurm, whole, dataset / "nowhere", tmp_path / "run", log)
    wait_until(lambda: slurm.state(job) == "FAILED", "it has failed", 60)
    assert "hmoe pretrain: error: data.path: " in log.read_text()
    assert "srun" not in log.read_text()


def test_preparing_with_a_worker_that_is_killed(slurm, tmp_path):
    log, out = tmp_path / "log", tmp_path / "dataset"
    words = ["nci5k", "synth:30000", "--shard-rows=3000"]
    job = slurm.submit(log, str(ROOT / "launchers" / "prepare.sbatch"), *words, "--out", str(out))
    records = lambda: len(list((out / ".hmoe_prepare").glob("record-*")))  # noqa: E731
    wait_until(lambda: records() >= 1 or slurm.state(job) in ("FAILED", "COMPLETED"), "work has begun", 120)
    worker = next(line for line in slurm.machine.command_lines() if "multiprocessing.spawn" in line)
    slurm.run("kill", "-9", worker.split()[0])
    slurm.wait_for(job, "COMPLETED", log)
    alone = tmp_path / "alone"
    slurm.run("hmoe", "prepare", *words, "--out", str(alone), "--workers=2")
    assert contents(out) == contents(alone)
    assert f"Worker process {worker.split()[0]} was killed by signal 9" in log.read_text()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
