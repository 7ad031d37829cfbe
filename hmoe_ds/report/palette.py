"""Colours that people with any colour vision tell apart.

Source: Okabe and Ito, "Color Universal Design", 2008; its black stands last, as it is that of text.
"""

from __future__ import annotations

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
OTHER = "#9A9A9A"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def color_of(place: int) -> str:
    """The colour of the place-th thing; those after the last colour share one."""
    return COLORS[place] if place < len(COLORS) else OTHER


def marker_of(place: int) -> str:
    """A marker that goes with the colour, so that colour is not the only sign."""
    return MARKERS[place % len(MARKERS)]


def rgb(color: str) -> tuple[float, float, float]:
    """Red, green and blue from 0 to 1."""
    red, green, blue = (int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return red, green, blue
