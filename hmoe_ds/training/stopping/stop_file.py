"""The file by which ranks are asked to stop where no signal reaches them. Imports no torch: launchers start quickly."""

from __future__ import annotations

import os
from pathlib import Path

# In the run's folder; rank 0 looks for it every second.
STOP_FILE = "stop"
# In this file: end at once, and save nothing.
END_NOW = "now"


def ask_to_stop(out: Path, now: bool = False) -> None:
    """Ask the ranks of the run in the folder `out` to save and end, or to end at once."""
    written = out / f"{STOP_FILE}.{os.getpid()}"
    written.write_text(END_NOW if now else "", encoding="ascii")
    written.replace(out / STOP_FILE)
