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

    Args:
        timed: take the time, too; `seconds` must then be asked for it now and then.
    """

    def __init__(self, timed: bool = False) -> None:
        self._sent = 0
        self._timed = timed
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def count(self, row_bytes: int, sent_R: Sequence[int], rank: int) -> None:
        """Count rows of `row_bytes` bytes, `sent_R[r]` to rank r, of which this rank is `rank`."""
        self._sent += row_bytes * (sum(sent_R) - sent_R[rank])

    def take(self) -> int:
        """The bytes since the last call."""
        taken, self._sent = self._sent, 0
        return taken

    @contextmanager
    def clock(self, device: torch.device) -> Iterator[None]:
        """Count the time of what is done inside, on `device`; the host does not wait for it."""
        if not self._timed:
            yield
        elif device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((first, last))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def seconds(self) -> float:
        """The time of the exchanges since the last call, waiting for other ranks included; waits for the device."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        taken, self._seconds, self._events = self._seconds, 0.0, []
        return taken


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
