"""Tasks for the tests of who does them. In a module of their own, as a child process imports it."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.durable import atomically
from data_pipeline.execution.task import Task
from data_pipeline.execution.watch import Watch
from data_pipeline.molecules.rejects import MoleculeReject


@dataclass(frozen=True)
class Square(Task[int]):
    work: str
    number: int

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.number,)

    @property
    def file(self) -> str:
        return f"{self.work}/square-{self.number}"

    def outputs(self, result: int) -> list[str]:
        return [self.file]

    def run(self, watch: Watch) -> int:
        if self.number < 0:
            raise ValueError(f"{self.number} is negative")
        with open(f"{self.work}/log", "a") as log:
            log.write(f"{self.number}\n")
        with atomically(self.file) as temporary:
            Path(temporary).write_text(str(self.number**2))
        return self.number**2


@dataclass(frozen=True)
class Rows(Task[list[str]]):
    """Works on one row after the other; what it does with each stands in `rows`."""

    work: str
    rows: tuple[str, ...]

    @property
    def identity(self) -> tuple[object, ...]:
        return self.rows

    def outputs(self, result: list[str]) -> list[str]:
        return []

    def run(self, watch: Watch) -> list[str]:
        watch.begin(0.3)
        done = []
        for index, row in enumerate(self.rows):
            try:
                watch.at(index)
            except MoleculeReject as reject:
                done.append(reject.reason)
                continue
            done.append(self._row(row))
        watch.rest()
        return done

    def _row(self, row: str) -> str:
        if row == "spin":
            while True:
                pass
        if row == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if row.startswith("killed"):
            kills = Path(self.work, row)
            with kills.open("a") as log:
                log.write("x")
            if kills.stat().st_size <= int(row.split()[1]):
                os.kill(os.getpid(), signal.SIGKILL)
        return row


@dataclass(frozen=True)
class Die(Task[int]):
    """Dies while it works on no row, the first `times` times."""

    work: str
    times: int

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.times,)

    def outputs(self, result: int) -> list[str]:
        return []

    def run(self, watch: Watch) -> int:
        before = len(list(Path(self.work).glob("death-*")))
        if before < self.times:
            Path(self.work, f"death-{before}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return before


@dataclass(frozen=True)
class Spin(Task[int]):
    """Never ends; leaves the id of its process."""

    work: str

    @property
    def identity(self) -> tuple[object, ...]:
        return ()

    def outputs(self, result: int) -> list[str]:
        return []

    def run(self, watch: Watch) -> int:
        Path(self.work, "pid").write_text(str(os.getpid()))
        while True:
            pass


@dataclass(frozen=True)
class Modules(Task[list[str]]):
    """Where the process that does it finds modules."""

    work: str

    @property
    def identity(self) -> tuple[object, ...]:
        return ()

    def outputs(self, result: list[str]) -> list[str]:
        return []

    def run(self, watch: Watch) -> list[str]:
        return sys.path


@dataclass(frozen=True)
class Say(Task[int]):
    """Writes a line to the standard error, and ends its process with `exit_code`, if that is not 0."""

    work: str
    line: str
    exit_code: int

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.line, self.exit_code)

    def outputs(self, result: int) -> list[str]:
        return []

    def run(self, watch: Watch) -> int:
        print(self.line, file=sys.stderr, flush=True)
        if self.exit_code:
            os._exit(self.exit_code)
        return 0
