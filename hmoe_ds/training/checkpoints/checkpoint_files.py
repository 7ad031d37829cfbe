"""The files of a checkpoint on one rank: what it writes is flushed and summed up, what it reads runs no code."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch.serialization import safe_globals

from hmoe_ds.model.checkpoint_record import CheckpointError, CheckpointFile

# What its files hold beside tensors and plain values; plain values, too.
_DEEPSPEED_TYPES = [LossScaler, ZeroStageEnum, fragment_address]


def read_state(path: str | Path, map_location: Any = None, mmap: bool = False) -> dict[str, Any]:
    """What a file of DeepSpeed's holds, read without running anything in it; raises what torch raises.

    `mmap`: tensors are left on disk until they are looked at.
    """
    with safe_globals(_DEEPSPEED_TYPES):
        state: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    return state


class CheckpointFiles(CheckpointEngine):
    """Through this the training engine writes and reads its files; ours are written through it too.

    A file that cannot be written is noted, not raised: the ranks that it concerns not are on their way to a collective,
    and would wait there for this one.

    Attributes:
        written: files of the checkpoint that is being written.
        error: why one of them could not be written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        """From here on it is another checkpoint."""
        self.written: list[CheckpointFile] = []
        self.error: OSError | None = None

    def write(self, path: Path, write: Callable[[Path], None]) -> None:
        """Have `write` write a file, unless one before it could not be written."""
        if self.error is not None:
            return
        try:
            write(path)
            self.written.append(CheckpointFile.of(path))
        except OSError as error:
            self.error = error

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write a file of the training engine's."""
        self.write(Path(path), lambda file: _write_state(state_dict, file))

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """Read one: tensors, plain values and what DeepSpeed writes, nothing that could run code.

        Raises:
            CheckpointError: it holds something else.
        """
        try:
            return read_state(path, map_location)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{path} is no file that a run writes ({type(error).__name__}): use a checkpoint that you trust"
            ) from error

    def create(self, info: CheckpointCommitInfo) -> None:
        """The training engine says that it begins."""

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """The training engine says that it is done."""
        return True


class _Stream:
    """A file for torch, which tells of a failed write only that there was one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _write_state(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        stream = _Stream(file)
        try:
            torch.save(state, cast(IO[bytes], stream))
        except RuntimeError:
            if stream.error is not None:
                raise stream.error from None
            raise
