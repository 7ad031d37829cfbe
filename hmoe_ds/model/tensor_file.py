"""Tensors in a file of safetensors, as others may read it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors, which may lie on any device. Raises OSError when the file cannot be written."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.part")
    try:
        # The library makes files that nobody else may read: they get the permissions of any other new file instead.
        with temporary.open("wb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, metadata)
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"{path}: {error}") from error
        raise
