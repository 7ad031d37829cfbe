"""Processes of a run that are killed or stopped: it is started again, and ends as if nothing had happened."""

import re
import signal

import pytest

from hmoe_ds.training import exit_codes
from hmoe_ds.training.launching.node import LAUNCHER, LOOP
from tests.distributed.harness import train
from tests.faults.processes import (
    check_same,
    end,
    output_of,
    pretrain,
    processes_of,
    running,
    wait_for_step,
    wait_until,
)

pytestmark = pytest.mark.timeout(1200)
LONG = {"run__steps": 150, "run__checkpoint_every": 10, "parallel__ep_size": 2, "run__hang_seconds": 15}


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A run in which nothing goes wrong."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out, dataset, ranks=2, **LONG)
    return out


def test_a_rank_killed_then_the_launcher_then_a_rank_stopped(whole, dataset, tmp_path):
    """One command survives it all."""
    out = tmp_path / "run"
    process = pretrain(out, dataset, 2, 3, **LONG)
    try:
        wait_for_step(out, 15, process)
        running(out, LOOP)[0].kill()
        wait_until(lambda: "restart 1 of 3" in output_of(out).read_text(), "it is started again")
        wait_for_step(out, 40, process)
        running(out, LAUNCHER)[0].kill()
        wait_until(lambda: output_of(out).read_text().count("restart 1 of 3") == 2, "it is started again")
        wait_for_step(out, 65, process)
        running(out, LOOP)[1].suspend()
        wait_until(lambda: output_of(out).read_text().count("restart 1 of 3") == 3, "it is started again")
        assert process.wait(timeout=240) == 0
    finally:
        end(process, out)
    said = output_of(out).read_text()
    assert re.search(
        r"no progress for 15 s at step \d+: rank 1 gives no sign of life: .*; rank 0 waits in \w+ \(hmoe", said
    )
    first, *others = [int(code) for code in re.findall(r"ended with exit code (\d+)", said)]
    assert first in (247, exit_codes.FAILED)  # of the rank that was killed, or of the other one, which fails then
    assert others == [137, exit_codes.HUNG]
    assert not processes_of(out)
    check_same(out, whole, tmp_path)


def test_the_command_killed_then_stopped_then_run_to_its_end(whole, dataset, tmp_path):
    out = tmp_path / "run"
    process = pretrain(out, dataset, 2, 0, **LONG)
    try:
        wait_for_step(out, 15, process)
        process.kill()
        process.wait()
        wait_until(lambda: not processes_of(out), "all ranks have noticed", 30)

        process = pretrain(out, dataset, 2, 0, **LONG)
        wait_for_step(out, 40, process)
        for one in processes_of(out):  # as schedulers do: launchers and ranks get it, too
            one.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=120) == exit_codes.REQUEUE
        stopped = re.search(r"stopped after step (\d+) of 150, as it was asked to", output_of(out).read_text())
        assert (out / "checkpoints" / f"step{int(stopped[1]):08d}").is_dir()
        assert not processes_of(out)

        process = pretrain(out, dataset, 2, 0, **LONG)
        wait_for_step(out, 80, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == exit_codes.REQUEUE
        assert len(re.findall(r"stopped after step \d+ of 150, as it was asked to", output_of(out).read_text())) == 2

        process = pretrain(out, dataset, 2, 0, **LONG)
        assert process.wait(timeout=240) == 0
    finally:
        end(process, out)
    check_same(out, whole, tmp_path)
