"""Tensors in a file of safetensors, as others may read it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.durable import atomically


def replace_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """`write_tensors` so that the file is there as a whole, or as it was. One process at a time may write it."""
    with atomically(path, path.with_name(f"{path.name}.tmp")) as temporary:
        write_tensors(Path(temporary), tensors, metadata)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors, which may lie on any device. Raises OSError when the file cannot be written."""
    # The library makes files that nobody else may read: they get the permissions of any other file instead.
    with path.open("wb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    path.chmod(mode)
