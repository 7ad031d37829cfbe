"""Who does the tasks: a child process, several in a Dask cluster on this machine, or a Dask cluster elsewhere."""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.execution.supervise import supervised
from data_pipeline.execution.task import Task, code_version, recorded_result

Result = TypeVar("Result")

MINIMUM_MEMORY = 768 << 20
DEFAULT_MEMORY = 2 << 30
# What a worker takes before it holds a molecule: libraries, compiled code, the memo of scaffolds.
_BASE_MEMORY = 448 << 20
# Copies of a partition that a reduce task holds at its peak: as read, joined, sorted, written; and room to err.
_COPIES = 5
# Arrow's list columns count their values in 31 bits; most molecules have 9 values in one for each 22 bytes.
_LARGEST_BUDGET = 2 << 30

_IN_FLIGHT_PER_WORKER = 3
_WORKERS_LOOKED_FOR_SECONDS = 60

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resources:
    """With what a dataset is built; it has no influence on what is built.

    workers: processes on this machine, one core each; scheduler: address of a Dask scheduler, whose workers are used
    instead and must see the output folder; memory: bytes that one worker may use.
    """

    workers: int = 1
    scheduler: str | None = None
    memory: int = DEFAULT_MEMORY

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"workers is {self.workers}; expected at least 1")
        if self.memory < MINIMUM_MEMORY:
            raise UsageError(
                f"memory is {self.memory >> 20} MiB per worker; expected at least {MINIMUM_MEMORY >> 20} MiB"
            )

    @property
    def budget(self) -> int:
        """Bytes of molecules that one reduce task may be given."""
        return min((self.memory - _BASE_MEMORY) // _COPIES, _LARGEST_BUDGET)


@dataclass
class TaskExecutor:
    """Runs tasks and counts those that an earlier run has done: `resumed` of all `tasks`."""

    _submit: Callable[[Task[Any]], Callable[[], Any]]
    # How many tasks to have under way: asked again and again, as workers may join.
    _in_flight: Callable[[], int]
    tasks: int = 0
    resumed: int = 0

    def run(self, tasks: Iterable[Task[Result]]) -> Iterator[Result]:
        """The result of each task, in order. Tasks are drawn as they can be worked on, never all at once.

        Raises:
            PipelineError: the workers are gone. An error of a task comes through as it is.
        """
        waiting: deque[Callable[[], Result]] = deque()
        for task in tasks:
            waiting.append(self._start(task))
            while len(waiting) >= self._in_flight():
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()

    def _start(self, task: Task[Result]) -> Callable[[], Result]:
        self.tasks += 1
        result = recorded_result(task)
        if result is None:
            return self._submit(task)
        self.resumed += 1
        return lambda: result


@contextmanager
def open_executor(resources: Resources, work: str) -> Iterator[TaskExecutor]:
    """The executor for tasks in the folder `work`.

    Raises:
        UsageError: no scheduler at the address, or no workers. While tasks run: a worker has other code or libraries,
            or does not see the folder.
    """
    if resources.scheduler is None and resources.workers == 1:
        yield TaskExecutor(_here, lambda: 1)
        return
    with _dask_client(resources, work) as client:
        if resources.scheduler is not None:
            _wait_for_workers(client, resources.scheduler)
        here = _Driver(code_version(), _marker(work))
        yield TaskExecutor(
            _Submit(client, here), lambda: _IN_FLIGHT_PER_WORKER * max(sum(client.nthreads().values()), 1)
        )


def _here(task: Task[Result]) -> Callable[[], Result]:
    result = supervised(task)
    return lambda: result


@dataclass(frozen=True)
class _Driver:
    """What a worker, whenever it joined, must have in common with this process: the code, and a file it sees."""

    code_version: str
    marker: str


@dataclass(frozen=True)
class _Submit:
    """Gives a task to Dask."""

    client: Any
    here: _Driver

    def __call__(self, task: Task[Result]) -> Callable[[], Result]:
        # Not pure: the same task of another run must not be answered from the scheduler's memory.
        future = self.client.submit(_perform, task, self.here, pure=False)
        return lambda: self._result(task, future)

    def _result(self, task: Task[Result], future: Any) -> Result:
        from distributed import CancelledError, KilledWorker

        try:
            while True:
                try:
                    return future.result(timeout=_WORKERS_LOOKED_FOR_SECONDS)
                except (TimeoutError, asyncio.TimeoutError):
                    if not self.client.nthreads():
                        _logger.warning("%s: the Dask scheduler has no workers any more; waiting for some", task)
        except KilledWorker as error:
            raise PipelineError(
                f"{task}: every worker that took it was killed ({error.last_worker}); start workers with more memory, "
                "or run with a smaller --memory; what is done is kept"
            ) from error
        except CancelledError as error:
            raise PipelineError(
                f"{task}: the scheduler is gone; start it and run again; what is done is kept"
            ) from error


@contextmanager
def _dask_client(resources: Resources, work: str) -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster

    # What goes wrong is raised here; Dask would tell of it a second time, at length.
    for name in ("distributed", *(name for name in logging.root.manager.loggerDict if name.startswith("distributed."))):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    settings = {"distributed.comm.timeouts.connect": "5s", "distributed.admin.tick.limit": "1h"}
    with dask.config.set(settings):
        if resources.scheduler is not None:
            try:
                client = Client(resources.scheduler)
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"--scheduler {resources.scheduler}: no Dask scheduler answers ({type(error).__name__}); expected "
                    "an address such as tcp://host:8786"
                ) from error
            with client:
                yield client
            return
        # Threads of this process, as each worker has a child process that does the work (`supervise`).
        cluster = LocalCluster(
            n_workers=resources.workers,
            threads_per_worker=1,
            processes=False,
            # On the loopback: by default Dask opens a web page to the whole network.
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
            memory_limit=None,
            local_directory=work,
            silence_logs=logging.CRITICAL,
        )
        with cluster, Client(cluster) as client:
            yield client


def _wait_for_workers(client: Any, scheduler: str) -> None:
    try:
        client.wait_for_workers(1, timeout=60)
    except (TimeoutError, asyncio.TimeoutError) as error:
        raise UsageError(
            f"--scheduler {scheduler}: it has no workers; start some with `dask worker {scheduler} --nthreads 1`"
        ) from error


def _marker(work: str) -> str:
    path = os.path.join(work, "marker")
    open(path, "w").close()
    return path


def _perform(task: Task[Result], driver: _Driver) -> Result:
    """Do a task in a worker, which may have joined late."""
    from distributed import get_worker

    address = get_worker().address
    if driver.code_version != code_version():
        raise UsageError(
            f"--scheduler: worker {address} has another version of hmoe_ds, RDKit, pyarrow or NumPy; install the same "
            "on all machines"
        )
    if not os.path.exists(driver.marker):
        raise UsageError(
            f"--scheduler: worker {address} does not see {os.path.dirname(driver.marker)}; put the output on a file "
            "system that all machines share"
        )
    return supervised(task)
