"""The header of a file of weights: names, shapes and dtypes. The weights themselves are not read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Tensor(NamedTuple):
    """What a header says of a tensor."""

    dtype: str
    shape: list[int]


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        SafetensorError: the file is damaged, such as shorter than its header says.
        FileNotFoundError: there is none.
    """
    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {
            name: Tensor(_DTYPES.get(each.get_dtype(), each.get_dtype()), each.get_shape())
            for name, each in slices.items()
        }
