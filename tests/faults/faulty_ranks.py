"""Ranks of runs in which something goes wrong, one run after the other: `python -m tests.faults.faulty_ranks JSON`.

A list of runs: `ranks`, `port`, `words` of the command line, `faults` (names of the functions below, and their
settings) and `logs`, a folder that gets the logs of the ranks and `codes.json` with their exit codes. The ranks run the
training loop as a launcher would start them.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from hmoe_ds.training import loop
from hmoe_ds.training.stopping import watchdog
from tests.distributed.ranks import become_rank, fork
from tests.limited_files import limited_files


def at_step(settings: dict, rank: int, action) -> None:
    """Do something on one rank just before the forward of a step."""
    measure, calls = loop.count_normalizers, []

    def count(*arguments):
        calls.append(None)
        if rank == settings["rank"] and len(calls) == settings["step"]:
            action()
        return measure(*arguments)

    loop.count_normalizers = count


def signalled(settings: dict, rank: int) -> None:
    at_step(settings, rank, lambda: os.kill(os.getpid(), getattr(signal, settings["signal"])))


def hanging(settings: dict, rank: int) -> None:
    at_step(settings, rank, lambda: time.sleep(settings["seconds"]))


def stopped(settings: dict, rank: int) -> None:
    at_step(settings, rank, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def blind_watchdog(settings: dict, rank: int) -> None:
    watchdog.Watchdog._report = lambda *arguments: time.sleep(1000)


def damaged_shard(settings: dict, rank: int) -> None:
    """All shards of the training split but the first are deleted, or a byte of them changed."""

    def damage():
        for path in sorted(Path(settings["dataset"]).glob("train/*.arrow")):
            if settings["how"] == "deleted":
                path.unlink()
            else:
                with path.open("r+b") as file:  # in its place: to what is mapped, a shorter file would be fatal
                    file.seek(path.stat().st_size // 2)
                    byte = file.read(1)[0]
                    file.seek(-1, os.SEEK_CUR)
                    file.write(bytes([byte ^ 1]))

    at_step(settings, rank, damage)


def not_finite(settings: dict, rank: int) -> None:
    """The gradient of some steps is not a number, on one rank only."""
    scale, calls = loop.loss_scale, []

    def loss_scale(config):
        calls.append(None)
        return float("nan") if rank == settings["rank"] and len(calls) in settings["steps"] else scale(config)

    loop.loss_scale = loss_scale


def full_disk(settings: dict, rank: int) -> None:
    """While some checkpoints are saved, one rank can write no more than so many bytes into a file."""
    save, calls = loop.save_checkpoint, []

    def save_checkpoint(*arguments):
        calls.append(None)
        full = rank == settings["rank"] and len(calls) in settings["saves"]
        with limited_files(settings["bytes"]) if full else contextlib.nullcontext():
            save(*arguments)

    loop.save_checkpoint = save_checkpoint


FUNCTIONS = (signalled, hanging, stopped, blind_watchdog, damaged_shard, not_finite, full_disk)
FAULTS = {function.__name__: function for function in FUNCTIONS}


def run_rank(rank: int, scenario: dict) -> None:
    become_rank(rank, Path(scenario["logs"]))
    for name, settings in scenario["faults"].items():
        FAULTS[name](settings, rank)
    loop.main(scenario["words"])


def run(scenario: dict) -> list[int]:
    """Run the ranks of one scenario; -> their exit codes."""
    os.environ |= {"WORLD_SIZE": str(scenario["ranks"]), "MASTER_PORT": str(scenario["port"])}
    rank_of = {}
    for rank in range(scenario["ranks"]):
        rank_of[fork(lambda rank=rank: run_rank(rank, scenario))] = rank
    codes: dict[int, int] = {}
    while len(codes) < len(rank_of):
        pid, status = os.wait()
        codes[rank_of[pid]] = os.waitstatus_to_exitcode(status)
        for other, rank in rank_of.items():  # a launcher would end them, in the end by force
            if rank not in codes and is_stopped(other):
                os.kill(other, signal.SIGKILL)
    return [codes[rank] for rank in range(scenario["ranks"])]


def is_stopped(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


if __name__ == "__main__":
    for scenario in json.loads(sys.argv[1]):
        (Path(scenario["logs"]) / "codes.json").write_text(json.dumps(run(scenario)))
