"""A run that is asked to stop, by SIGTERM or SIGUSR1, saves where it is after the step that it computes, and ends.

Schedulers ask so before they take a machine away (Slurm's `--signal`, a spot machine's notice).
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import FrameType, TracebackType

import psutil
from torch import Tensor

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StoppedError(Exception):
    """The run was asked to stop, and has saved where it is."""


class StopRequest:
    """Whether this run was asked to stop: one rank that was is enough, all end after the same step.

    It works in the context of this object, in the main thread.
    """

    def __init__(self) -> None:
        self.asked = False
        self._seen: Tensor | None = None
        self._signals, self._wakeup = socket.socketpair()
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

    def agreed(self, asked: Tensor) -> bool:
        """Whether all ranks stop after this step.

        Args:
            asked: how many ranks were asked up to this step, the same on all of them. The host looks at what the last
                call was given, which the device has computed by now, so it waits for nothing.
        """
        before, self._seen = self._seen, asked.to("cpu", non_blocking=True)
        return before is not None and before.item() > 0

    def _listen(self) -> None:
        # Not in the signal's handler: that waits until the main thread comes back from what it calls, such as a
        # collective that a dead rank will never join.
        while received := self._signals.recv(64):
            if set(received) & set(SIGNALS):
                if signal.SIGTERM in received and _neighbour_is_gone():
                    os._exit(128 + signal.SIGTERM)
                self.asked = True


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """The number of the signal is on its way to the thread."""


def _neighbour_is_gone() -> bool:
    """Whether a rank of this machine has ended: then the launcher ends the others, and there is nothing to save."""
    ranks = int(os.environ.get("LOCAL_SIZE", "1"))  # DeepSpeed's launcher says so
    return len(psutil.Process(os.getppid()).children()) < ranks
