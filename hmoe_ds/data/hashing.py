"""Counter-based random numbers: a hash of what they are for, instead of a stream with a position.

They do not depend on ranks, on the order of calls or on a library's version, and there is no state to save.
Source: the finaliser of splitmix64 (Steele, Lea, Flood, 2014).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]


def mix64(x: U64) -> U64:
    """Bijective scrambling of 64-bit integers, element by element."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*parts: U64 | int) -> U64:
    """One 64-bit hash per element of the broadcast `parts`; the order of parts matters."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mix64(state ^ np.asarray(part).astype(np.uint64))
    return state


def uniform(*parts: U64 | int) -> NDArray[np.float64]:
    """Like `hash64`, as numbers in [0, 1)."""
    return (hash64(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53
