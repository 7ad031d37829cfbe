"""Start a command that trains, wherever its ranks are, and start it again from the last checkpoint when it fails.

`python -m hmoe_ds.training.launch --out RUN [--restarts N] -- COMMAND...` does so with any command, such as `srun ...`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

import psutil

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.redact import redacted
from hmoe_ds.training import exit_codes
from hmoe_ds.training.launching.supervise import supervise
from hmoe_ds.training.launching.supervisor import supervisor_environment
from hmoe_ds.training.lock import locked_command
from hmoe_ds.training.outcome import read_outcome
from hmoe_ds.training.run_folder import newest_step
from hmoe_ds.training.stopping.stop_file import STOP_FILE, ask_to_stop

GRACE_SECONDS, STOP_SECONDS = 10.0, 900.0
# Ranks elsewhere look every second whether they are to end.
_NOTICE_SECONDS = 3.0
# Some schedulers send the same signal to all processes, some of which pass it on.
_ECHO_SECONDS = 5.0


class Command(NamedTuple):
    """What starts ranks.

    Attributes:
        words: of the command line.
        environment: all of it.
        folder: to start in; None: this one.
    """

    words: list[str]
    environment: Mapping[str, str]
    folder: str | None = None


class Launcher:
    """Runs commands that start ranks, and passes on what it is asked by signals, in the context of this object.

    After SIGTERM, SIGUSR1 or SIGHUP the ranks, wherever they are, are asked to save where they are and end (by a file
    in the run's folder); there is no other attempt. SIGINT, a second signal, or `STOP_SECONDS` without an end, end the
    command and all of its processes here: with SIGTERM, and with SIGKILL what is left after `GRACE_SECONDS`.

    Args:
        out: the run's folder.
        elsewhere: the ranks are on other machines: they are then asked to end at once by the same file. The processes
            here get no SIGTERM, after which DeepSpeed's runner would end all runs of this user on those machines.
    """

    def __init__(self, out: Path, elsewhere: bool = False) -> None:
        self._out = out
        self._elsewhere = elsewhere
        self._received: list[int] = []
        self._received_at = 0.0

    def __enter__(self) -> Launcher:
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` has it ignored
            numbers.append(signal.SIGHUP)
        self._handlers = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self, command: Callable[[], Command], restarts: int) -> int:
        """Attempts until the run is done, or it makes no sense to go on (`supervise`); -> the exit code.

        Args:
            command: of the next attempt; where there can be none now, it raises a PipelineError.
            restarts: restarts in a row without a new checkpoint after which it gives up.

        Raises:
            PipelineError: another process runs commands for this folder.
        """
        with locked_command(self._out):
            return self._code(supervise(lambda: self._attempt(command), self.pause, self._out, restarts))

    def run_part(self, command: Command) -> int:
        """One attempt of a part of the ranks, whose other parts are started by others; -> the exit code."""
        code = self._run(command)
        return 128 + signal.SIGINT if signal.SIGINT in self._received else code

    def _code(self, code: int) -> int:
        """The exit code of the whole, from that of the last attempt."""
        if signal.SIGINT in self._received:
            return 128 + signal.SIGINT
        if self._received and code not in (exit_codes.DONE, exit_codes.REQUEUE):
            step = newest_step(self._out)
            print(f"hmoe pretrain: it ended before it had saved; it goes on from step {step}", file=sys.stderr)
            return exit_codes.REQUEUE
        return code

    def _receive(self, number: int, frame: FrameType | None) -> None:
        echo = self._received[-1:] == [number] and time.monotonic() - self._received_at < _ECHO_SECONDS
        if not echo:
            self._received.append(number)
            self._received_at = time.monotonic()

    def _attempt(self, command: Callable[[], Command]) -> int:
        try:
            (self._out / STOP_FILE).unlink(missing_ok=True)
            next_one = command()
            if self._received:  # while it was being made
                return exit_codes.FAILED
            code = self._run(next_one)
        except (PipelineError, OSError) as error:
            print(redacted(f"hmoe pretrain: error: {error}"), file=sys.stderr)
            return exit_codes.USAGE if isinstance(error, UsageError) else exit_codes.FAILED
        outcome = read_outcome(self._out)
        if outcome.done:
            return exit_codes.DONE  # whatever happened after that
        # A part of the ranks may say that it was asked to stop when it was only ended, as another part had failed.
        asked = outcome.stopped or bool(self._received)
        return exit_codes.FAILED if code == exit_codes.REQUEUE and not asked else code

    def _run(self, command: Command) -> int:
        environment = {**command.environment, **supervisor_environment()}
        # A session of its own, because the launcher does not pass signals on to the ranks. It would die of SIGUSR1,
        # which some schedulers send to all processes.
        process = subprocess.Popen(
            command.words, env=environment, cwd=command.folder, start_new_session=True, preexec_fn=_ignore_usr1
        )
        try:
            code = self._wait(process)
        finally:
            self._end(process)
            if self._elsewhere:
                self._end_elsewhere()
        if read_outcome(self._out).stopped:
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
            ask_to_stop(self._out)
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

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """End every process of the command's group that is still there, and the ranks."""
        if self._elsewhere and _signal_group(process, 0):
            ask_to_stop(self._out, now=True)
            _wait_for_group(process, GRACE_SECONDS)
        for number in (signal.SIGKILL,) if self._elsewhere else (signal.SIGTERM, signal.SIGKILL):
            if not _signal_group(process, number):
                return
            _wait_for_group(process, GRACE_SECONDS)

    def _end_elsewhere(self) -> None:
        """End ranks that have lost their launcher, as the network was away for a while, and train on."""
        outcome = read_outcome(self._out)
        if not outcome.done and not outcome.stopped:
            ask_to_stop(self._out, now=True)
            time.sleep(_NOTICE_SECONDS)

    def pause(self, seconds: float) -> bool:
        """Wait so long, unless it is asked to stop; -> whether it was not."""
        deadline = time.monotonic() + seconds
        while not self._received and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self._received


def _ignore_usr1() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _wait_for_group(process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        process.poll()
        if not _signal_group(process, 0):
            return
        time.sleep(0.1)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Signal the command's group (0: nothing is sent); -> whether there was anyone left in it."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    # In a container whose first process does not collect what others leave behind, the dead stay in their group.
    return any(_is_alive_in(process.pid, one) for one in psutil.process_iter())


def _is_alive_in(group: int, one: psutil.Process) -> bool:
    try:
        return os.getpgid(one.pid) == group and one.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command; -> its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hmoe_ds.training.launch",
        description="Start a command that trains, and start it again from the last checkpoint when it fails.",
    )
    parser.add_argument("--out", required=True, type=Path, help="the run's folder, run.out")
    parser.add_argument("--restarts", type=int, default=3, help="restarts in a row without a checkpoint (default: 3)")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    options = parser.parse_args(argv)
    try:
        with Launcher(options.out) as launcher:
            return launcher.run(lambda: Command(options.command, os.environ), options.restarts)
    except PipelineError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return exit_codes.FAILED


if __name__ == "__main__":
    sys.exit(main())
