"""`make soak`: a tiny run that is killed again and again ends as the run that never was. Up to 20 minutes.

Real processes are killed at random moments: ranks that are forked here, and processes of `hmoe pretrain` (ranks,
launchers, the command itself). Then a run dies at every flush, rename, removal and new folder of what it writes, and at
every third write, both as a process and with its machine. Prints one JSON line.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from hmoe_ds.training.launching.node import LAUNCHER, LOOP, free_port
from tests.conftest import prepare_nci
from tests.distributed.harness import ROOT, arguments, read_metrics, run_module, train
from tests.faults import processes

LONG = {"run__steps": 800, "run__checkpoint_every": 4, "parallel__ep_size": 2, "data__molecules_per_step": 16}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=32, help="of forked ranks (default: 32)")
    parser.add_argument("--command-kills", type=int, default=8, help="of processes of hmoe pretrain (default: 8)")
    parser.add_argument("--every-write", type=int, default=3, help="crash points at every n-th write (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen, started = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "dataset").mkdir()
        dataset = prepare_nci(folder / "dataset", 0, 600)
        whole = folder / "whole"
        train(whole, dataset, ranks=2, **LONG)
        run_killed = folder / "killed"
        forked = kill_forked_ranks(run_killed, dataset, folder / "logs", options.kills, chosen)
        check_same(run_killed, whole)
        commanded, seconds = kill_commands(folder / "commanded", dataset, options.command_kills, chosen)
        check_same(folder / "commanded", whole)
        (folder / "crash").mkdir()
        points = [str(dataset), str(folder / "crash"), str(options.every_write), "1"]
        run_module("tests.faults.crash_runs", 1, points, timeout=1200)
        crash_points = json.loads((folder / "crash" / "summary.json").read_text())
    figures = {"kills": len(forked) + len(commanded), "lost_steps": forked + commanded, "crash_points": crash_points}
    figures["seconds_to_the_next_step"] = seconds
    print(json.dumps(figures | {"seconds": round(time.monotonic() - started)}))


def kill_forked_ranks(out: Path, dataset: Path, logs: Path, kills: int, chosen: random.Random) -> list[int]:
    """Kill one of two ranks, or both, `kills` times, then let them end; -> steps lost by each kill."""
    logs.mkdir()
    lost: list[int] = []
    while True:
        scenario = {
            "ranks": 2, "port": free_port(), "faults": {}, "logs": str(logs), "words": arguments(out, dataset, **LONG)
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.faulty_ranks", json.dumps([scenario])],
            cwd=ROOT, env=os.environ | {"MASTER_ADDR": "127.0.0.1"}, start_new_session=True,
        )  # fmt: skip
        ranks, at_start = wait_for_ranks(process), processes.steps_logged(out)
        if len(lost) < kills:
            wait_for_moment(out, at_start, process, chosen)
            kill(chosen.choice([ranks[:1], ranks[1:], ranks]))
            before = processes.steps_logged(out)
            if before == at_start:  # they may not have met yet: the launcher, which is not there, would end the other
                kill(ranks)
        assert process.wait(timeout=300) == 0
        assert not processes.processes_of(out)
        codes = json.loads((logs / "codes.json").read_text())
        if codes == [0, 0]:
            assert len(lost) >= kills, f"done after {len(lost)} kills: give the run more steps"
            return lost
        lost.append(max(0, before - newest(out)))  # it may have gone on between the two looks


def kill(ranks: list[psutil.Process]) -> None:
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has noticed that the other one is gone
            rank.kill()


def wait_for_moment(out: Path, at_start: int, process: subprocess.Popen, chosen: random.Random) -> None:
    """Wait until a random moment: of the start, or of the steps after it."""
    if chosen.random() < 0.25:
        time.sleep(chosen.uniform(0.5, 4))
        return
    step = at_start + chosen.randrange(1, 9)
    processes.wait_until(lambda: processes.steps_logged(out) >= step or process.poll() is not None, f"step {step}")
    time.sleep(chosen.uniform(0, 0.3))


def wait_for_ranks(process: subprocess.Popen) -> list[psutil.Process]:
    found: list[psutil.Process] = []

    def forked() -> bool:
        found[:] = psutil.Process(process.pid).children()
        return len(found) == 2

    processes.wait_until(forked, "the ranks are forked")
    return sorted(found, key=lambda rank: rank.pid)


def newest(out: Path) -> int:
    names = [path.name for path in (out / "checkpoints").glob("step????????")]
    return max((int(name.removeprefix("step")) for name in names), default=0)


def kill_commands(out: Path, dataset: Path, kills: int, chosen: random.Random) -> tuple[list[int], list[float]]:
    """The same with `hmoe pretrain`: of ranks and launchers it recovers by itself; killed, it is started again.

    -> steps lost by each kill, and the seconds from each to the next step.
    """
    lost: list[int] = []
    seconds: list[float] = []
    process = processes.pretrain(out, dataset, 2, 5, **LONG)
    try:
        while len(lost) < kills:
            processes.wait_for_step(out, newest(out) + chosen.randrange(2, 25), process)
            module = chosen.choice([LOOP, LAUNCHER, "hmoe_ds.cli"])
            victim, before = chosen.choice(processes.running(out, module)), processes.steps_logged(out)
            ranks, killed = processes.running(out, LOOP), time.time()
            victim.kill()
            if module == "hmoe_ds.cli":
                process.wait()
            wait_until_gone(ranks)
            lost.append(max(0, before - newest(out)))  # it may have gone on between the two looks
            if module == "hmoe_ds.cli":
                processes.wait_until(lambda: not processes.processes_of(out), "nothing is left of it", 60)
                process = processes.pretrain(out, dataset, 2, 5, **LONG)
            seconds.append(seconds_to_next_step(out, killed, process))
        assert process.wait(timeout=300) == 0
    finally:
        processes.end(process, out)
    return lost, seconds


def seconds_to_next_step(out: Path, killed: float, process: subprocess.Popen) -> float:
    """How long it takes from a kill to the next step that is done."""

    def times() -> list[float]:
        try:
            return [line["time"] for line in read_metrics(out) if line["time"] > killed + 1]
        except (OSError, ValueError):
            return []

    processes.wait_until(lambda: bool(times()) or process.poll() is not None, "the next step is done", 180)
    assert times(), processes.output_of(out).read_text()[-3000:]
    return round(times()[0] - killed, 1)


def wait_until_gone(ranks: list[psutil.Process]) -> None:
    processes.wait_until(lambda: not any(rank.is_running() for rank in ranks), "all ranks have noticed", 60)


def check_same(out: Path, whole: Path) -> None:
    """The same losses, the same files of the last checkpoint, nothing left over."""
    runs = [[(line["step"], line["loss"]) for line in read_metrics(folder)] for folder in (out, whole)]
    assert runs[0] == runs[1]
    for name in ("weights.safetensors", "experts-00000-of-00002.safetensors", "experts-00001-of-00002.safetensors"):
        last = f"step{LONG['run__steps']:08d}"
        one, other = ((folder / "checkpoints" / last / name).read_bytes() for folder in (out, whole))
        assert one == other, f"{name} differs"
    left = {path.name for path in (out / "checkpoints").iterdir()}
    assert left == {path.name for path in (whole / "checkpoints").iterdir()}, left
    assert not list(out.rglob("*.tmp"))


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
