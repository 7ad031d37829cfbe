"""Some molecules that stand for a whole dataset."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_pipeline.schema import RUN_LENGTH


def spread_rows(rows: int, wanted: int) -> NDArray[np.int64]:
    """Up to `wanted` of a dataset's rows, evenly spread over so many of its first ones that each is of another run."""
    end = min(rows, RUN_LENGTH * wanted)
    return np.linspace(0, max(end - 1, 0), min(wanted, end)).astype(np.int64)
