"""Tasks done in a child process, so that neither a molecule that hangs RDKit nor a crash ends the run.

Each thread that calls `supervised` has a child of its own for that time. Children are kept for the next task, and end
when this process does.
"""

import logging
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from multiprocessing.connection import Pipe
from typing import Any, TypeVar

from data_pipeline.errors import PipelineError
from data_pipeline.execution.compiled import cache_of_version
from data_pipeline.execution.said import Said
from data_pipeline.execution.task import Task, code_version
from data_pipeline.execution.watch import NO_ROW, TIME_IS_UP

Result = TypeVar("Result")

_logger = logging.getLogger(__name__)

# A row that ended the process so often is rejected; the machine may have been at fault once, and a kill comes from
# outside, unless it comes again and again, for memory.
_CRASHES_OF_A_ROW = 2
_KILLS_OF_A_ROW = 5
# So often may the process be killed while it works on no row in particular.
_DEATHS_OF_A_TASK = 3
# So often may it be killed at ever different rows, since one was last rejected for it: the machine is out of memory.
_KILLS_OF_A_TASK = 20

# The child imports what this process would. Python puts the current folder, with whatever lies there, before all else:
# it has to go before the first import that is not built in.
_START = """
import sys
numbers, sys.path[:] = sys.argv[1:4], sys.argv[4:]
from data_pipeline.execution.child import main
main(*map(int, numbers))
"""

_idle: list["_Child"] = []


def supervised(task: Task[Result]) -> Result:
    """`task.perform` in a child process, again and again while the process dies of a row or is killed.

    A row that uses up its time is rejected as `timeout`, one that ends the process again and again as `crash`.

    Raises:
        PipelineError: the child dies without a row being to blame. An error of the task comes through as it is.
    """
    rejected: dict[int, str] = {}
    deaths = _Deaths(task)
    while True:
        child = _take_child()
        try:
            done, value = child.ask(task, rejected)
        except (EOFError, ConnectionError):
            row, exit_code = child.post_mortem()
            reason = deaths.add(row, exit_code, child.said.pass_on())
            if reason is not None:
                rejected[row] = reason
            _logger.warning("%s: a worker process ended at row %d (%s); again", task, row, _cause(exit_code))
            continue
        except BaseException:
            # Interrupted: what is being worked on is of no use any more.
            child.kill()
            raise
        child.said.pass_on()
        _idle.append(child)
        if done:
            return value
        raise value


class _Deaths:
    """The processes that died of a task, and what is to blame."""

    def __init__(self, task: Task[Any]) -> None:
        self._task = task
        self._count: Counter[tuple[int, int]] = Counter()
        self._kills = 0

    def add(self, row: int, exit_code: int, said: str) -> str | None:
        """A process has ended at `row`: the reason to reject the row, None if it gets another chance.

        `said`: the last line it wrote.

        Raises:
            PipelineError: it happens too often for the task to be done.
        """
        self._count[row, exit_code] += 1
        times = self._count[row, exit_code]
        if row == NO_ROW:
            if times == _DEATHS_OF_A_TASK:
                raise self._failure(times, exit_code, said) if exit_code >= 0 else self._error(times, exit_code)
            return None
        if exit_code == -TIME_IS_UP:
            return "timeout"
        if exit_code != -signal.SIGKILL:
            return "crash" if times == _CRASHES_OF_A_ROW else None
        self._kills += 1
        if times == _KILLS_OF_A_ROW:
            self._kills = 0
            return "crash"
        if self._kills == _KILLS_OF_A_TASK:
            raise self._error(self._kills, exit_code)
        return None

    def _failure(self, times: int, exit_code: int, said: str) -> PipelineError:
        """Python ended it: it could not be started, say."""
        return PipelineError(
            f"{self._task}: the worker process ended {times} times by itself before any row ({_cause(exit_code)}), and "
            f"said last: {said or 'nothing'}; mend that and run again; what is done is kept"
        )

    def _error(self, times: int, exit_code: int) -> PipelineError:
        return PipelineError(
            f"{self._task}: the worker process ended {times} times ({_cause(exit_code)}); run again with fewer "
            "--workers or a smaller --memory; what is done is kept"
        )


def _take_child() -> "_Child":
    while True:
        try:
            child = _idle.pop()
        except IndexError:
            return _Child()
        if child.environment == os.environ:
            return child
        # Started with other credentials, say.
        child.kill()


def _cause(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    hint = ": killed from outside, or for memory" if exit_code == -signal.SIGKILL else ""
    return signal.Signals(-exit_code).name + hint


class _Child:
    """A process that performs tasks (`data_pipeline.execution.child`)."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self.said = Said()
        with tempfile.TemporaryFile() as file:
            file.truncate(mmap.PAGESIZE)
            self._cell = mmap.mmap(file.fileno(), mmap.PAGESIZE)
            self._connection, theirs = Pipe()
            # Nothing is ever sent. Only this process holds the sending end: it closes when the process dies.
            parent_gone, self._alive = os.pipe()
            fds = (theirs.fileno(), parent_gone, file.fileno())
            modules = (path or os.getcwd() for path in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, *map(str, fds), *modules],
                stdin=subprocess.DEVNULL,
                stderr=self.said.file,
                pass_fds=fds,
                env={**os.environ, **cache_of_version(code_version())},
            )
        theirs.close()
        os.close(parent_gone)

    def ask(self, task: Task[Any], rejected: dict[int, str]) -> tuple[bool, Any]:
        """(True, the result) or (False, the error). EOFError or ConnectionError: the process is dead."""
        self._row[0] = NO_ROW
        self._connection.send((task, rejected))
        return self._connection.recv()

    def post_mortem(self) -> tuple[int, int]:
        """Of a dead process: the row it was at, and its exit code."""
        self._connection.close()
        os.close(self._alive)
        return self._row[0], self._process.wait()

    def kill(self) -> None:
        self._process.kill()
        self.post_mortem()

    @property
    def _row(self) -> memoryview:
        return memoryview(self._cell).cast("q")
