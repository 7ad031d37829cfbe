"""Questions to processes of their own: what is asked may crash, hang, or print what it likes."""

from __future__ import annotations

import json
import subprocess
import sys
from types import TracebackType
from typing import Any


class ProbeError(Exception):
    """There is no answer; the message says why, in one line."""


class Probe:
    """A module of this package that runs with `arguments` until the end of this object's context.

    Args:
        module: its last line on standard output is JSON.
        arguments: of it.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"hmoe_ds.doctor.{module}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )

    def answer(self, seconds: float) -> Any:
        """Wait for the answer.

        Raises:
            ProbeError: there is none after `seconds`, or the process failed.
        """
        try:
            out, err = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise ProbeError(f"no answer within {seconds:g} s") from None
        if self._process.returncode < 0:
            raise ProbeError(f"ended by signal {-self._process.returncode}")
        if self._process.returncode > 0:
            raise ProbeError(_last_line(err) or f"exit code {self._process.returncode}")
        return json.loads(_last_line(out))

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
