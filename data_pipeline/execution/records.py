"""Results of tasks as bytes, and back: like pickle, but reading them runs no code.

A dataset folder that comes from others may hold a work folder with such files.
"""

import dataclasses
import io
import pickle
from typing import Any

# What NumPy makes an array or a number of, by the names that its versions have for it.
_NUMPY = {"numpy": {"ndarray", "dtype"}}
_NUMPY |= {f"numpy.{core}.multiarray": {"_reconstruct", "scalar"} for core in ("core", "_core")}
_NUMPY |= {f"numpy.{core}.numeric": {"_frombuffer"} for core in ("core", "_core")}


def to_bytes(value: object) -> bytes:
    """`value`, of plain values, NumPy arrays, counters and dataclasses of this package."""
    return pickle.dumps(value)


def from_bytes(content: bytes) -> Any:
    """The inverse of `to_bytes`.

    Raises:
        pickle.UnpicklingError: it is no such content, as it is damaged or names something else to call.
    """
    try:
        return _Unpickler(io.BytesIO(content)).load()
    except Exception as error:  # of damaged content pickle raises whatever it runs into
        raise pickle.UnpicklingError(str(error)) from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "Counter") or name in _NUMPY.get(module, ()):
            return super().find_class(module, name)
        if module.startswith("data_pipeline.") and "." not in name:
            found = super().find_class(module, name)
            # A dataclass of ours only keeps its fields; a function that the module imports would be called.
            if isinstance(found, type) and dataclasses.is_dataclass(found) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is not what a record holds")
