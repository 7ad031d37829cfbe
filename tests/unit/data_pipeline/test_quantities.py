"""Quantities in words."""

import pytest

from data_pipeline.quantities import byte_size, duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.6, "60 s"), (90, "2 min"), (3599, "1 h 00 min"), (7500, "2 h 05 min"), (50 * 3600, "2 d 2 h")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (17_530_000, "17.5 MB"),
        (2.25e9, "2.2 GB"),
        (3e15, "3000.0 TB"),
    ],
)
def test_sizes(size, words):
    assert byte_size(size) == words
