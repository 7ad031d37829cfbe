"""Ends a rank whose run makes no progress, and says which rank hangs, and in which collective the others wait for it.

Every rank tells the others, through a key-value store, that it lives and what it is doing. A rank whose launcher is
gone ends too, so that no process is left of a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import FrameType, TracebackType
from typing import NamedTuple, NoReturn

import torch
from torch.distributed import distributed_c10d

from hmoe_ds.training.best_effort import say
from hmoe_ds.training.exit_codes import FAILED, HUNG
from hmoe_ds.training.launching.supervisor import supervisor_is_gone
from hmoe_ds.training.stopping.stop import StopRequest

# What ranks that start may take to find each other and to load what they need; `hang_seconds` where that is more.
START_SECONDS = 900.0
_LOOK_SECONDS = 1.0
_STORE_SECONDS = 10.0
_REPORTED = "hang reported"
_SHOWN = 8  # ranks that are named


class Beat(NamedTuple):
    """A rank's sign of life.

    Attributes:
        number: grows as long as the process lives.
        step: that it computes, from 1.
        collective: in which it waits for other ranks, if it does. On GPUs it waits elsewhere, for what they compute.
        place: where it is in our code.
        joined: collectives that it has begun, by the name of the group.
    """

    number: int
    step: int
    collective: str
    place: str
    joined: Mapping[str, int] = {}


class Watchdog:
    """Watches this rank from a thread, in the context of this object.

    Args:
        hang_seconds: time without progress after which the run has hung, from its first step on.
        rank: this rank.
        ranks: of the run.
        stop: of this rank. One that was asked to stop saves also when its launcher is gone.
    """

    def __init__(self, hang_seconds: float, rank: int, ranks: int, stop: StopRequest) -> None:
        self._stop = stop
        self._hang_seconds, self._rank, self._ranks = hang_seconds, rank, ranks
        self._beat_seconds = min(_STORE_SECONDS, hang_seconds / 10)
        self._call_seconds = min(_STORE_SECONDS, hang_seconds / 2)
        self._number, self._step, self._last = 0, 0, time.monotonic()
        self._watched = threading.get_ident()
        self._parent = os.getppid()
        self._ended, self._reporting = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._reporting.is_set():
            # That ends this process, and not with what the end of other ranks does to this one.
            self._thread.join(3 * self._beat_seconds + 6 * self._call_seconds)

    def progress(self, step: int) -> None:
        """This rank gets on: it computes step `step`, from 1."""
        self._step, self._last = step, time.monotonic()

    def _watch(self) -> None:
        board = _Board(self._rank, self._ranks, self._call_seconds)
        next_beat = 0.0
        while not self._ended.wait(min(_LOOK_SECONDS, self._beat_seconds)):
            if self._is_orphan():
                _end(f"rank {self._rank}: the launcher is gone, so this rank ends", FAILED)
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self._beat_seconds
                board.publish(self._beat())
            if time.monotonic() - self._last > self._limit():
                self._reporting.set()
                self._report(board)

    def _limit(self) -> float:
        return self._hang_seconds if self._step else max(self._hang_seconds, START_SECONDS)

    def _is_orphan(self) -> bool:
        if self._stop.asked:
            return False
        return os.getppid() != self._parent or supervisor_is_gone()

    def _beat(self) -> Beat:
        self._number += 1
        frames = sys._current_frames()
        return Beat(self._number, self._step, *_doing(frames.get(self._watched)), _joined())

    def _report(self, board: _Board) -> NoReturn:
        head = f"no progress for {self._limit():g} s at step {self._step}"
        before = board.read()
        time.sleep(2.5 * self._beat_seconds)
        mine = self._beat()
        board.publish(mine)
        time.sleep(0.5 * self._beat_seconds)
        beats = board.read()
        if before is None or beats is None:
            place = describe_hang({self._rank: mine}, [self._rank], [self._rank])
            _end(f"{head}: rank 0, through which ranks hear of each other, does not answer; {place}", HUNG)
        beats[self._rank] = mine
        alive = [rank for rank, beat in sorted(beats.items()) if beat != before.get(rank)]
        if self._rank != alive[0]:
            board.wait_for_report()
            _end("", HUNG)
        say(f"{head}: {describe_hang(beats, alive, range(self._ranks))}")
        board.note_report()
        _end("", HUNG)


class _Board:
    """Where ranks read each other's signs of life: the store through which they found each other, hosted by rank 0.

    A connection of our own, as that of torch may be in use. A call to a host that was stopped may never return, so each
    is made in a thread, which is given up after a while.
    """

    def __init__(self, rank: int, ranks: int, seconds: float) -> None:
        self._rank, self._ranks, self._seconds = rank, ranks, seconds
        self._store: torch.distributed.Store | None = None
        self._calling: threading.Thread | None = None

    def publish(self, beat: Beat) -> None:
        """Give a sign of life, if that is possible."""
        self._call(lambda store: store.set(f"beat{self._rank}", json.dumps(beat)))

    def read(self) -> dict[int, Beat] | None:
        """The last sign of life of each rank; None when the store does not answer."""
        found: dict[int, Beat] = {}

        def read_all(store: torch.distributed.Store) -> None:
            for rank in range(self._ranks):
                if store.check([f"beat{rank}"]):
                    found[rank] = Beat(*json.loads(store.get(f"beat{rank}")))

        return found if self._call(read_all) else None

    def note_report(self) -> None:
        """This rank has said who hangs."""
        self._call(lambda store: store.set(_REPORTED, ""))

    def wait_for_report(self) -> None:
        """Wait for that rank to say it, if it can: the end of this one is all that others would see."""
        said = threading.Event()

        def look(store: torch.distributed.Store) -> None:
            if store.check([_REPORTED]):
                said.set()

        deadline = time.monotonic() + self._seconds
        while self._call(look) and not said.is_set() and time.monotonic() < deadline:
            time.sleep(0.1)

    def _call(self, action: Callable[[torch.distributed.Store], None]) -> bool:
        """-> whether it could be done in time."""
        if self._ranks == 1:
            return True
        done = threading.Event()

        def work() -> None:
            with contextlib.suppress(RuntimeError):
                if self._store is None:
                    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                    timeout = timedelta(seconds=_STORE_SECONDS)
                    self._store = torch.distributed.TCPStore(address, port, is_master=False, timeout=timeout)
                action(self._store)
                done.set()

        if self._calling is not None and self._calling.is_alive():
            return False
        self._calling = threading.Thread(target=work, name="board", daemon=True)
        self._calling.start()
        self._calling.join(self._seconds)
        return done.is_set()


def describe_hang(beats: Mapping[int, Beat], alive: list[int], ranks: Sequence[int]) -> str:
    """Who hangs, in words.

    Args:
        beats: last sign of life of each rank that gave one.
        alive: ranks that gave a new one just now.
        ranks: of which this is asked.
    """
    parts = []
    silent = [rank for rank in ranks if rank not in alive]
    if silent:
        parts.append(f"{_name(silent)} gives no sign of life: it is stopped, or its machine or network is gone")
    busy = [rank for rank in alive if not beats[rank].collective]
    parts += [f"rank {rank} is busy or stuck in {beats[rank].place}" for rank in busy]
    waiting = Counter((beats[rank].collective, beats[rank].place) for rank in alive if rank not in busy)
    for (collective, place), _ in waiting.most_common():
        there = [rank for rank in alive if (beats[rank].collective, beats[rank].place) == (collective, place)]
        parts.append(f"{_name(there)} waits in {collective} ({place})")
    return "; ".join([*parts, *_late(beats, alive)])


def _late(beats: Mapping[int, Beat], alive: list[int]) -> Iterator[str]:
    """Who has begun fewer collectives than others of its group, group by group."""
    for group in sorted({group for rank in alive for group in beats[rank].joined}):
        joined = {rank: beats[rank].joined[group] for rank in alive if group in beats[rank].joined}
        most = max(joined.values())
        late = [rank for rank, number in joined.items() if number < most]
        if late:
            numbers = ", ".join(str(joined[rank]) for rank in late[:_SHOWN])
            yield f"{_name(late)} has begun {numbers} collectives of {_name(list(joined))}, others {most}"


def _name(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN]))
    return f"rank {shown}" + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")


def _joined() -> dict[str, int]:
    """Of each group of ranks that this one belongs to, how many collectives it has begun."""
    groups = dict(distributed_c10d._world.pg_names)
    return {name: group._get_sequence_number_for_group() for group, name in groups.items()}  # type: ignore[attr-defined]


def _doing(frame: FrameType | None) -> tuple[str, str]:
    """-> (the collective in which a thread waits, or "", and the place in our code)."""
    collective = place = ""
    for entry, line in traceback.walk_stack(frame):
        file = entry.f_code.co_filename.replace(os.sep, "/")
        if file.endswith("torch/distributed/distributed_c10d.py"):
            collective = entry.f_code.co_name  # the outermost one: what was called
        elif "/hmoe_ds/" in file and not place:
            place = f"{file[file.rindex('/hmoe_ds/') + 1 :]}:{line}"
    return collective, place


def _end(message: str, code: int) -> NoReturn:
    """End this process at once, whatever its other threads are in."""
    if message:
        say(message)
    os._exit(code)
