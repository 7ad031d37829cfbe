"""A run that is asked to stop, by SIGTERM or SIGUSR1, saves where it is after the step that it computes, and ends.

Schedulers ask so before they take a machine away (Slurm's `--signal`, a spot machine's notice).
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from types import FrameType, TracebackType

import psutil
import torch
from torch import Tensor

from hmoe_ds.training import exit_codes
from hmoe_ds.training.stopping.stop_file import END_NOW

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LOOK_SECONDS = 1.0


class StoppedError(Exception):
    """The run was asked to stop, and has saved where it is."""


class StopRequest:
    """Whether this run was asked to stop: one rank that was is enough, all end after the same step.

    It works in the context of this object, in the main thread.
    """

    def __init__(self) -> None:
        self.asked = False
        self._launcher = os.getppid()
        self._file: Path | None = None
        self._seen: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._signals, self._wakeup = socket.socketpair()
        self._signals.settimeout(_LOOK_SECONDS)
        self._wakeup.setblocking(False)

    def __enter__(self) -> StopRequest:
        self._handlers = {number: signal.signal(number, _leave_to_thread) for number in SIGNALS}
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="stop", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._wakeup.close()
        self._thread.join()
        self._signals.close()

    def look_for(self, file: Path) -> None:
        """From now on also a file asks (`stop_file`), for those who cannot signal a rank; it is removed when seen."""
        self._file = file

    def agreed(self, asked: Tensor) -> bool:
        """Whether all ranks stop after this step.

        Args:
            asked: how many ranks were asked up to this step, the same on all of them. On a GPU the host looks at what
                the last call was given, which it need not wait for.
        """
        if asked.is_cuda:
            before, copied = self._seen, self._copied
            self._seen, self._copied = asked.to("cpu", non_blocking=True), torch.cuda.Event()
            self._copied.record()
            if before is None or copied is None:
                return False
            copied.synchronize()
            asked = before
        self.asked = self.asked or asked.item() > 0
        return asked.item() > 0

    def _listen(self) -> None:
        # Not in the signal's handler: that waits until the main thread comes back from what it calls, such as a
        # collective that a dead rank will never join.
        while True:
            try:
                received = self._signals.recv(64)
            except TimeoutError:
                self._look_for_file()
                continue
            if not received:
                return
            if set(received) & set(SIGNALS):
                if signal.SIGTERM in received and self._is_cleared_away():
                    os._exit(128 + signal.SIGTERM)
                self.asked = True

    def _is_cleared_away(self) -> bool:
        """Whether SIGTERM means that the attempt has failed: the launcher is gone, or another rank of this machine.

        Who clears away what is left of it asks for no stop, and the run is to be started again.
        """
        if os.getppid() != self._launcher:
            return True
        ranks = int(os.environ.get("LOCAL_SIZE", "1"))  # DeepSpeed's launcher says so
        return len(psutil.Process(self._launcher).children()) < ranks

    def _look_for_file(self) -> None:
        if self._file is None:
            return
        try:
            os.close(os.open(self._file.parent, os.O_RDONLY))  # a network's file system then looks anew what is there
            now = self._file.read_text(encoding="utf-8") == END_NOW
            self._file.unlink(missing_ok=True)
        except FileNotFoundError:
            return
        except (OSError, UnicodeError):  # it cannot be read or removed, but it is there
            now = False
        if now:
            os._exit(exit_codes.FAILED)  # the other ranks notice
        self.asked = True


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """The number of the signal is on its way to the thread."""
