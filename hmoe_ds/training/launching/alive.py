"""Whether ranks run on this machine.

`python -m hmoe_ds.training.launching.alive` ends with 0 if they do, and with 1 if not.

For liveness probes of Kubernetes. Whether ranks get on they know better themselves (`watchdog`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

import psutil

from hmoe_ds.training.launching.node import LOOP


def is_rank(command: Sequence[str]) -> bool:
    """Whether a process with this command line is a rank. DeepSpeed's launcher has the same module among its words."""
    return ("-m", LOOP) in pairwise(command)


if __name__ == "__main__":
    commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    sys.exit(0 if any(map(is_rank, commands)) else 1)
