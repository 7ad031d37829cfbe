"""The process that `supervise` starts: performs one task after the other."""

import mmap
import os
import signal
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa

from data_pipeline.errors import PipelineError
from data_pipeline.execution.task import Task, perform
from data_pipeline.execution.watch import Watch


def main(connection_fd: int, parent_gone_fd: int, cell_fd: int) -> None:
    """Perform the tasks that come over the connection until it closes."""
    # Ctrl-C is the parent's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(parent_gone_fd,), daemon=True).start()
    # A worker is one core.
    pa.set_cpu_count(1)
    connection = Connection(connection_fd)
    cell = mmap.mmap(cell_fd, mmap.PAGESIZE)
    while True:
        try:
            task, rejected = connection.recv()
        except EOFError:
            return
        connection.send(_answer(task, Watch(cell, rejected)))


def _answer(task: Task[Any], watch: Watch) -> tuple[bool, Any]:
    try:
        return True, perform(task, watch)
    except (PipelineError, OSError, pa.ArrowException) as error:
        return False, error
    except Exception:
        # A defect of ours, and an exception does not take along where it happened.
        return False, RuntimeError(f"{task}: {traceback.format_exc()}")


def _exit_with_parent(parent_gone_fd: int) -> None:
    os.read(parent_gone_fd, 1)
    os._exit(1)
