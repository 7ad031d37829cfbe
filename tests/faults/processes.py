"""A run as its user starts it, through `hmoe pretrain` and the launcher, and its processes, to be killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil

from hmoe_ds.downstream.export import export_checkpoint
from tests.distributed.harness import ROOT, arguments, read_metrics


def pretrain(out: Path, dataset: Path, ranks: int, restarts: int, **changes) -> subprocess.Popen:
    """Start `hmoe pretrain`; its output goes to a file beside the run's folder."""
    command = [sys.executable, "-m", "hmoe_ds.cli", "pretrain", "--num_ranks", str(ranks), "--restarts", str(restarts)]
    with output_of(out).open("a") as output:
        return subprocess.Popen(
            [*command, *arguments(out, dataset, **changes)],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip


def output_of(out: Path) -> Path:
    return out.parent / f"{out.name}.log"


def processes_of(out: Path) -> list[psutil.Process]:
    """All processes of a run: its folder is in their command lines."""
    found = []
    for process in psutil.process_iter():
        try:
            if f"--run.out={out}" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def running(out: Path, module: str) -> list[psutil.Process]:
    """Those of them that run `module` itself, the lowest rank first."""
    return sorted((p for p in processes_of(out) if ("-m", module) in pairwise(p.cmdline())), key=lambda p: p.pid)


def wait_until(reached: Callable[[], bool], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"waited too long until {what}"
        time.sleep(0.05)


def steps_logged(out: Path) -> int:
    """The last step in `metrics.jsonl`; 0 for none, or while it is written."""
    try:
        return read_metrics(out)[-1]["step"]
    except (OSError, ValueError, IndexError):
        return 0


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    wait_until(lambda: steps_logged(out) >= step or process.poll() is not None, f"step {step}")
    assert process.poll() is None, output_of(out).read_text()[-3000:]


def end(process: subprocess.Popen, out: Path) -> None:
    """End what is left of a run."""
    for left in [process, *processes_of(out)]:
        try:
            left.send_signal(signal.SIGKILL)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    process.wait()


def check_same(out: Path, whole: Path, folder: Path) -> None:
    """A run ended as if nothing had happened: judged by what is there, not by exit codes."""
    assert [(line["step"], line["loss"]) for line in read_metrics(out)] == [
        (line["step"], line["loss"]) for line in read_metrics(whole)
    ]
    exported = []
    for number, run in enumerate((out, whole)):
        export_checkpoint(run, folder / f"export{number}")
        exported.append((folder / f"export{number}" / "model.safetensors").read_bytes())
    assert exported[0] == exported[1]
