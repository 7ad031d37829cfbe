"""Quantities in words, for people: durations, sizes in bytes."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Such as `40 s`, `3 min`, `2 h 05 min`, `4 d 3 h`."""
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def byte_size(size: float) -> str:
    """Such as `12 bytes`, `3.4 kB`, `1.2 GB`, in powers of 1,000."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= length:
            return f"{size / length:.1f} {unit}"
    return f"{size:.0f} bytes"
