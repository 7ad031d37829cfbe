"""Numbers in the words of the report."""

from __future__ import annotations

import numpy as np


def short(number: float) -> str:
    """To three digits, such as `12.3M`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"


def decimals(value: float | None, digits: int = 3) -> str:
    """With so many decimals; None is one that was not finite."""
    return "not finite" if value is None or np.isnan(value) else f"{value:.{digits}f}"
