"""The process that starts the launcher: ranks end with it; those on other machines, when nobody reads their output."""

from __future__ import annotations

import os
import select
from functools import cache
from pathlib import Path

_VARIABLE = "HMOE_SUPERVISOR"


def supervisor_environment() -> dict[str, str]:
    """What tells ranks of this process."""
    return {_VARIABLE: f"{os.getpid()} {_process_space()}"}


def is_supervised() -> bool:
    """Whether this process was started, here or on another machine, by one that starts the run again."""
    return _VARIABLE in os.environ


def _supervisor_here() -> int | None:
    """The process that started the launcher; None when there is none, or none that can be seen from here.

    The variable may reach ranks on other machines and in other containers.
    """
    process, _, space = os.environ.get(_VARIABLE, "").partition(" ")
    return int(process) if process.isdecimal() and space == _process_space() else None


def supervisor_is_gone() -> bool:
    """Whether the process that started the launcher has ended, as far as that shows here.

    Of one on another machine it shows by the output of this process: what carried it there reads it no more. Of a
    process that was not supervised, it never does.
    """
    process = _supervisor_here()
    if process is not None:
        return not _is_alive(process)
    return is_supervised() and not _output_is_read()


def _output_is_read() -> bool:
    """Whether what standard error is connected to has another end; a file has."""
    poll = select.poll()
    poll.register(2, 0)
    return not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _is_alive(process: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@cache  # the watchdog asks every second
def _process_space() -> str:
    """Where the numbers of processes are the same: a start of a machine, and in it a namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
