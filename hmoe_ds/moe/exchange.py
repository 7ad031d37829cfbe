"""Rows that ranks send each other, with gradient; how many bytes of them leave a rank, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Traffic:
    """Bytes that this rank sent to other ranks, in forwards and backwards, and the time of these exchanges.

    What is counted belongs to a step when it is taken, and to none when it is forgotten, such as that of a validation.

    Args:
        timed: take the time, too; `seconds` must then be asked for it now and then.
    """

    def __init__(self, timed: bool = False) -> None:
        self._timed = timed
        self._sent = 0
        self._clocks: list[_Clock] = []
        self._taken: list[_Clock] = []

    def count(self, row_bytes: int, sent_R: Sequence[int], rank: int) -> None:
        """Count rows of `row_bytes` bytes, `sent_R[r]` to rank r, of which this rank is `rank`."""
        self._sent += row_bytes * (sum(sent_R) - sent_R[rank])

    @contextmanager
    def clock(self, device: torch.device) -> Iterator[None]:
        """Count the time of what is done inside, on `device`; the host does not wait for it."""
        if not self._timed:
            yield
            return
        clock = _EventClock() if device.type == "cuda" else _HostClock()
        yield
        clock.stop()
        self._clocks.append(clock)

    def forget(self) -> None:
        """Drop what was counted since it was taken: it is of no step."""
        self._sent, self._clocks = 0, []

    def take(self) -> int:
        """The bytes since they were taken or forgotten; the time is kept for `seconds`."""
        taken, self._sent = self._sent, 0
        self._taken += self._clocks
        self._clocks = []
        return taken

    def seconds(self) -> float:
        """The time that was taken since the last call, waiting for other ranks included; waits for the device."""
        seconds = sum(clock.seconds() for clock in self._taken)
        self._taken = []
        return seconds


class _HostClock:
    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._lasted = 0.0

    def stop(self) -> None:
        self._lasted = time.perf_counter() - self._began

    def seconds(self) -> float:
        return self._lasted


class _EventClock:
    """The time on a GPU, which does its work later."""

    def __init__(self) -> None:
        self._first, self._last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._first.record()

    def stop(self) -> None:
        self._last.record()

    def seconds(self) -> float:
        self._last.synchronize()
        return self._first.elapsed_time(self._last) / 1000


_Clock = _HostClock | _EventClock


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, traffic: Traffic, sent_R: list[int], received_R: list[int], *columns: Tensor
    ) -> Any:
        ctx.group, ctx.traffic, ctx.sent_R, ctx.received_R = group, traffic, sent_R, received_R
        return tuple(exchange_columns(columns, group, traffic, sent_R, received_R))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        returned = exchange_columns(grads, ctx.group, ctx.traffic, ctx.received_R, ctx.sent_R)
        return None, None, None, None, *returned


def exchange_rows(
    columns: Sequence[Tensor],
    group: dist.ProcessGroup,
    traffic: Traffic,
    sent_R: list[int],
    received_R: list[int],
) -> tuple[Tensor, ...]:
    """All-to-all of rows, in one exchange; gradients go back the same way.

    Args:
        columns: tensors [N, ...] with one row for each of the N rows that are sent, sorted by rank; any dtypes.
        group: of R ranks, all of which take part.
        traffic: counts what leaves this rank.
        sent_R: rows to each rank.
        received_R: rows from each rank.

    Returns:
        The columns of the rows that were received, sorted by rank.
    """
    return _ExchangeRows.apply(group, traffic, sent_R, received_R, *columns)


def exchange_columns(
    columns: Sequence[Tensor], group: dist.ProcessGroup, traffic: Traffic, sent_R: list[int], received_R: list[int]
) -> list[Tensor]:
    """`exchange_rows` without gradient."""
    sent = columns[0].contiguous() if len(columns) == 1 else join_columns(columns)
    traffic.count(sent.shape[1] * sent.element_size(), sent_R, dist.get_rank(group))
    received = sent.new_empty(sum(received_R), sent.shape[1])
    with traffic.clock(sent.device):
        dist.all_to_all_single(received, sent, received_R, sent_R, group=group)
    return [received] if len(columns) == 1 else split_columns(received, columns)


def join_columns(columns: Sequence[Tensor]) -> Tensor:
    """Rows of several dtypes as rows of bytes."""
    return torch.cat([_packed(column).view(torch.uint8) for column in columns], dim=1)


def split_columns(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Inverse of `join_columns`, for columns of the dtypes and widths of `like`."""
    widths = [column.shape[1] * column.element_size() for column in like]
    parts = rows.split(widths, dim=1)
    return [_packed(part).view(column.dtype) for part, column in zip(parts, like, strict=True)]


def _packed(rows: Tensor) -> Tensor:
    # `contiguous` leaves strides and offset of a single row, or of none, as they are; views of other dtypes need them.
    return rows.clone(memory_format=torch.contiguous_format)
