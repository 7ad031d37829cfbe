"""Start the ranks of a run on this machine through the `deepspeed` launcher, and again when they fail.

`python -m hmoe_ds.training.launch --out RUN [--restarts N] -- COMMAND...` does so with any command that starts ranks,
such as `deepspeed --hostfile H --module hmoe_ds.training.loop ...`.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from hmoe_ds.config import ConfigError
from hmoe_ds.training import exit_codes
from hmoe_ds.training.outcome import read_outcome
from hmoe_ds.training.run_folder import newest_step
from hmoe_ds.training.stop_file import STOP_FILE
from hmoe_ds.training.supervise import supervise
from hmoe_ds.training.supervisor import supervisor_environment

GRACE_SECONDS, STOP_SECONDS = 10.0, 900.0
LOOP = "hmoe_ds.training.loop"


def default_ranks(ep_size: int) -> int:
    """One rank per GPU; without GPUs as many as the experts are spread over."""
    return _gpu_count() or ep_size


def launch(argv: Sequence[str], ranks: int, out: Path, restarts: int) -> int:
    """Run the training loop with arguments `argv` on `ranks` ranks here; -> its exit code, 128 + n after SIGINT.

    Args:
        argv: of the loop.
        ranks: how many.
        out: the run's folder.
        restarts: failures in a row without a new checkpoint after which it is not started again.

    Raises:
        ConfigError: fewer GPUs than ranks, on a machine with GPUs.
    """
    gpus = _gpu_count()
    if 0 < gpus < ranks:
        raise ConfigError(f"--num_ranks is {ranks}, but this machine has {gpus} GPUs: start at most {gpus} ranks here")
    with Launcher(out) as launcher:
        # Another port for each attempt, as that of the one before may still be in use.
        return launcher.run(lambda: (_command(argv, ranks), _environment(ranks, gpus)), restarts)


class Launcher:
    """Runs commands that start ranks, and passes on what it is asked by signals, in the context of this object.

    After SIGTERM or SIGUSR1 the ranks, wherever they are, are asked to save where they are and end (by a file in the
    run's folder); there is no other attempt. SIGINT, a second signal, or `STOP_SECONDS` without an end, end the command
    and all of its processes here: with SIGTERM, and with SIGKILL what is left after `GRACE_SECONDS`.

    Args:
        out: the run's folder.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._received: list[int] = []

    def __enter__(self) -> Launcher:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._handlers = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self, command: Callable[[], tuple[list[str], dict[str, str] | None]], restarts: int) -> int:
        """Attempts until the run is done, or it makes no sense to go on (`supervise`); -> the exit code.

        Args:
            command: of the next attempt, and its environment (None: that of this process).
            restarts: failures in a row without a new checkpoint after which it is not started again.
        """
        code = supervise(lambda: self._attempt(*command()), self._pause, self._out, restarts)
        if signal.SIGINT in self._received:
            return 128 + signal.SIGINT
        if self._received and code not in (exit_codes.DONE, exit_codes.REQUEUE):
            step = newest_step(self._out)
            print(f"hmoe pretrain: it ended before it had saved; it goes on from step {step}", file=sys.stderr)
            return exit_codes.REQUEUE
        return code

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)

    def _attempt(self, command: list[str], environment: dict[str, str] | None) -> int:
        (self._out / STOP_FILE).unlink(missing_ok=True)
        environment = (os.environ if environment is None else environment) | supervisor_environment()
        # A session of its own, because the launcher does not pass signals on to the ranks. It would die of SIGUSR1,
        # which some schedulers send to all processes.
        process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_ignore_usr1)
        try:
            code = self._wait(process)
        finally:
            _end_group(process)
        if self._received and read_outcome(self._out).stopped:
            return exit_codes.REQUEUE  # whatever became of its launcher
        return code if code >= 0 else 128 - code

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait until the command ends, or is to be ended; -> its exit code."""
        while not self._received:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
        if signal.SIGINT not in self._received and self._out.is_dir():
            (self._out / STOP_FILE).touch()
            self._wait_for_end(process)
        return exit_codes.FAILED if process.poll() is None else process.returncode

    def _wait_for_end(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the command, and for ranks that may go on without it, as they save."""
        deadline = time.monotonic() + STOP_SECONDS
        while len(self._received) < 2 and time.monotonic() < deadline:
            process.poll()
            if not _signal_group(process, 0):
                return
            time.sleep(0.1)

    def _pause(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self._received and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self._received


def _ignore_usr1() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _command(argv: Sequence[str], ranks: int) -> list[str]:
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", os.devnull, "--num_gpus", str(ranks)),
        *("--log_level", "error", "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--no_local_rank"),
        *("--module", LOOP, *argv),
    ]


def _environment(ranks: int, gpus: int) -> dict[str, str]:
    """Defaults for the ranks' environment; what the user has set stays."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        # DeepSpeed calls a collective that newer torch has renamed, and torch says so on every rank.
        "PYTHONWARNINGS": "ignore::FutureWarning:torch.distributed.c10d_logger",
    }
    if not gpus:
        # Torch then asks for huge pages: a step allocates all its activations anew, and small pages cost it a tenth.
        defaults |= {"DS_ACCELERATOR": "cpu", "THP_MEM_ALLOC_ENABLE": "1"}
    return {**defaults, **os.environ}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End every process of the launcher's group that is still there."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not _signal_group(process, number):
            return
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            process.poll()
            if not _signal_group(process, 0):
                return
            time.sleep(0.1)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Signal the launcher's group (0: nothing is sent); -> whether there was anyone left in it."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _gpu_count() -> int:
    import torch  # here, because it takes seconds, which a mistake in the configuration need not cost

    return torch.cuda.device_count()


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command; -> its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hmoe_ds.training.launch",
        description="Start a command that trains, and start it again from the last checkpoint when it fails.",
    )
    parser.add_argument("--out", required=True, type=Path, help="the run's folder, run.out")
    parser.add_argument("--restarts", type=int, default=3, help="failures in a row without a checkpoint (default: 3)")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    options = parser.parse_args(argv)
    with Launcher(options.out) as launcher:
        return launcher.run(lambda: (options.command, None), options.restarts)


if __name__ == "__main__":
    sys.exit(main())
