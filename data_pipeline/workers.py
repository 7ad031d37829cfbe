"""Runs the tasks of a stage, in this process or in several, and gives their results in the order of the tasks."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TypeVar

from data_pipeline.errors import PipelineError

Task = TypeVar("Task")
Result = TypeVar("Result")

_IN_FLIGHT_PER_WORKER = 2


class Workers:
    """A pool of worker processes; with one worker, no process is started. Use it in a `with` statement."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            # Spawned, not forked: a fork copies the locks of threads that RDKit, Arrow or the caller have started.
            spawn = get_context("spawn")
            # Nothing is ever sent. Only this process holds the sending end: it closes when the process dies.
            parent_gone, self._alive = spawn.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(count, spawn, initializer=_start_worker, initargs=(parent_gone,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if kind is not None:
            # What is being worked on is of no use any more.
            self._alive.close()
        self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """`function(task)` of each task, in order. Tasks are drawn as they can be worked on, never all at once.

        Raises:
            PipelineError: a worker died. An error inside `function` comes through as it is.
        """
        if self._pool is None:
            return map(function, tasks)
        return self._run_in_pool(self._pool, function, tasks)

    def _run_in_pool(
        self, pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Iterable[Task]
    ) -> Iterator[Result]:
        in_flight: deque[tuple[Task, Future[Result]]] = deque()
        try:
            for task in tasks:
                if len(in_flight) == _IN_FLIGHT_PER_WORKER * self._count:
                    yield in_flight[0][1].result()
                    in_flight.popleft()
                in_flight.append((task, pool.submit(function, task)))
            while in_flight:
                yield in_flight[0][1].result()
                in_flight.popleft()
        except BrokenProcessPool as error:
            near = f" near {in_flight[0][0]}" if in_flight else ""
            raise PipelineError(
                f"a worker process died{near}: killed for memory, or crashed; run again with fewer --workers"
            ) from error


def _start_worker(parent_gone: Connection) -> None:
    """Leave Ctrl-C to the main process, and end as soon as it closes its end of the pipe, or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_at_end_of_file, args=(parent_gone,), daemon=True).start()


def _exit_at_end_of_file(parent_gone: Connection) -> None:
    parent_gone.poll(None)
    os._exit(1)
