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
from collections.abc import Mapping
from datetime import timedelta
from types import FrameType, TracebackType
from typing import NamedTuple, NoReturn

import torch

from hmoe_ds.training.exit_codes import FAILED, HUNG
from hmoe_ds.training.launch import SUPERVISOR

_LOOK_SECONDS = 1.0
_STORE_SECONDS = 10.0


class Beat(NamedTuple):
    """A rank's sign of life.

    Attributes:
        number: grows as long as the process lives.
        step: that it computes, from 1.
        collective: in which it waits for other ranks, if it does.
        place: where it is in our code.
    """

    number: int
    step: int
    collective: str
    place: str


class Watchdog:
    """Watches this rank from a thread, in the context of this object.

    Args:
        hang_seconds: time without progress after which the run has hung.
        rank: this rank.
        ranks: of the run.
    """

    def __init__(self, hang_seconds: float, rank: int, ranks: int) -> None:
        self._hang_seconds, self._rank, self._ranks = hang_seconds, rank, ranks
        self._number, self._step, self._last = 0, 0, time.monotonic()
        self._watched = threading.get_ident()
        self._parent = os.getppid()
        self._supervisor = int(os.environ.get(SUPERVISOR, "0"))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._ended.set()

    def progress(self, step: int) -> None:
        """This rank gets on: it computes step `step`, from 1."""
        self._step, self._last = step, time.monotonic()

    def _watch(self) -> None:
        board = _Board(self._rank, self._ranks)
        beat_seconds = min(_STORE_SECONDS, self._hang_seconds / 10)
        next_beat = 0.0
        while not self._ended.wait(min(_LOOK_SECONDS, beat_seconds)):
            if self._is_orphan():
                _end(f"rank {self._rank}: the launcher is gone, so this rank ends", FAILED)
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + beat_seconds
                board.publish(self._beat())
            if time.monotonic() - self._last > self._hang_seconds:
                self._report(board, beat_seconds)

    def _is_orphan(self) -> bool:
        return os.getppid() != self._parent or (self._supervisor > 0 and not _is_alive(self._supervisor))

    def _beat(self) -> Beat:
        self._number += 1
        frames = sys._current_frames()
        return Beat(self._number, self._step, *_doing(frames.get(self._watched)))

    def _report(self, board: _Board, beat_seconds: float) -> NoReturn:
        before = board.read()
        time.sleep(2.5 * beat_seconds)
        mine = self._beat()
        board.publish(mine)
        time.sleep(0.5 * beat_seconds)
        beats = board.read() | {self._rank: mine}
        alive = [rank for rank, beat in sorted(beats.items()) if beat != before.get(rank)]
        if self._rank != alive[0]:
            time.sleep(beat_seconds)  # let that one speak
            _end("", HUNG)
        hang = describe_hang(beats, alive, self._ranks)
        _end(f"no progress for {self._hang_seconds:g} s at step {self._step}: {hang}", HUNG)


class _Board:
    """Where ranks read each other's signs of life: the store through which they found each other.

    A connection of our own, as that of torch may be in use. Rank 0 hosts the store: when it does not answer, nobody's
    signs of life can be read.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks
        if ranks > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            timeout = timedelta(seconds=_STORE_SECONDS)
            self._store = torch.distributed.TCPStore(address, port, is_master=False, timeout=timeout)

    def publish(self, beat: Beat) -> None:
        if self._ranks > 1:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"beat{self._rank}", json.dumps(beat))

    def read(self) -> dict[int, Beat]:
        found: dict[int, Beat] = {}
        with contextlib.suppress(RuntimeError):
            for rank in range(self._ranks if self._ranks > 1 else 0):
                if self._store.check([f"beat{rank}"]):
                    found[rank] = Beat(*json.loads(self._store.get(f"beat{rank}")))
        return found


def describe_hang(beats: Mapping[int, Beat], alive: list[int], ranks: int) -> str:
    """Who hangs, in words.

    Args:
        beats: last sign of life of each rank that gave one.
        alive: ranks that gave a new one just now.
        ranks: of the run.
    """
    parts = []
    silent = [rank for rank in range(ranks) if rank not in alive]
    if silent:
        parts.append(
            f"{_name(silent)} gives no sign of life: it is stopped, or its machine or network is gone"
            + (" (through rank 0 the ranks hear of each other)" if 0 in silent else "")
        )
    busy = [rank for rank in alive if not beats[rank].collective]
    parts += [f"rank {rank} is busy or stuck in {beats[rank].place}" for rank in busy]
    waiting = Counter((beats[rank].collective, beats[rank].place) for rank in alive if rank not in busy)
    for (collective, place), _ in waiting.most_common():
        there = [rank for rank in alive if (beats[rank].collective, beats[rank].place) == (collective, place)]
        parts.append(f"{_name(there)} waits in {collective} ({place})")
    return "; ".join(parts)


def _name(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


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


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _end(message: str, code: int) -> NoReturn:
    """End this process at once, whatever its other threads are in."""
    if message:
        print(message, file=sys.stderr, flush=True)
    os._exit(code)
