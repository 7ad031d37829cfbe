"""A piece of the work, named by what it is made from, and the record that it is done.

A task writes its files under a temporary name and renames them, and its record comes last. So a task that is done
twice, by two machines at once or again after a kill, leaves the same bytes; and what has a record need not be done
again, by whatever run, as the record's name holds everything that decides the result: the input's checksum, the
options, the code and the versions of the libraries.
"""

import os
import pickle
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numba
import numpy as np
import pyarrow as pa
import rdkit

import data_pipeline
from data_pipeline.durable import atomically
from data_pipeline.execution.records import from_bytes, to_bytes
from data_pipeline.execution.watch import Watch
from data_pipeline.keys import digest128

Result = TypeVar("Result")


class Task(ABC, Generic[Result]):
    """A frozen dataclass that can be sent to another process or machine: it holds paths, never molecules."""

    # The folder that tasks share.
    work: str

    @property
    @abstractmethod
    def identity(self) -> tuple[object, ...]:
        """What decides the result and the bytes of the files: plain values, the same on every machine."""

    @abstractmethod
    def run(self, watch: Watch) -> Result:
        """Do the task. `watch` is told of each row before RDKit works on it."""

    @abstractmethod
    def outputs(self, result: Result) -> list[str]:
        """The files that the task has written, when it gave `result`."""

    @property
    def key(self) -> str:
        """128 bits, hexadecimal: the name of the task, its files and its record."""
        return digest(type(self).__name__, code_version(), *self.identity)


def digest(*values: object) -> str:
    """128-bit BLAKE2b, hexadecimal, of plain values."""
    return digest128(repr(values).encode("utf-8", "surrogateescape")).hex()


@cache
def code_version() -> str:
    """A checksum of this package's code and the versions of the libraries that decide what it writes."""
    files = sorted(Path(data_pipeline.__file__).parent.rglob("*.py"))
    code = digest(*(path.read_bytes() for path in files))
    return digest(code, rdkit.__version__, pa.__version__, np.__version__, numba.__version__)


def perform(task: Task[Result], watch: Watch) -> Result:
    """Do a task and write its record."""
    result = task.run(watch)
    sizes = [os.path.getsize(file) for file in task.outputs(result)]
    with atomically(_record_file(task)) as path:
        Path(path).write_bytes(to_bytes((result, sizes)))
    return result


def recorded_result(task: Task[Result]) -> Result | None:
    """The result of a task that is done and whose files are there, whole; None when there is something to do."""
    record = read_record(_record_file(task))
    if record is None:
        return None
    result, sizes = record
    files = task.outputs(result)
    return result if [os.path.getsize(file) if os.path.exists(file) else None for file in files] == sizes else None


def read_record(path: str) -> Any:
    """What a file of ours holds (`records`); None when it is not there, or damaged by a crash of the machine."""
    try:
        return from_bytes(Path(path).read_bytes())
    except (FileNotFoundError, pickle.UnpicklingError):
        return None


def _record_file(task: Task[Result]) -> str:
    return work_file(task.work, "record", task.key)


def work_file(work: str, kind: str, key: str) -> str:
    """A file of a task in the work folder."""
    return os.path.join(work, f"{kind}-{key}")
