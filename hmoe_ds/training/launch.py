"""Start the ranks of a run on this machine through the `deepspeed` launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence


def default_ranks(ep_size: int) -> int:
    """One rank per GPU; without GPUs as many as the experts are spread over."""
    return _gpu_count() or ep_size


def launch(argv: Sequence[str], ranks: int) -> int:
    """Run the training loop with arguments `argv` on `ranks` ranks here; -> the launcher's exit code.

    SIGINT and SIGTERM are passed on to the launcher, which ends the ranks.
    """
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)),
        *("--log_level", "error", "--master_addr", "127.0.0.1", "--master_port", str(_free_port()), "--no_local_rank"),
        *("--module", "hmoe_ds.training.loop", *argv),
    ]
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if not _gpu_count():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    process = subprocess.Popen(command, env=environment)
    previous = {
        number: signal.signal(number, lambda received, _: process.send_signal(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _gpu_count() -> int:
    import torch  # here, because it takes seconds, which a mistake in the configuration need not cost

    return torch.cuda.device_count()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
