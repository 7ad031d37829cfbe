"""Start the ranks of a run on this machine through the `deepspeed` launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from hmoe_ds.config import ConfigError

GRACE_SECONDS = 10.0


def default_ranks(ep_size: int) -> int:
    """One rank per GPU; without GPUs as many as the experts are spread over."""
    return _gpu_count() or ep_size


def launch(argv: Sequence[str], ranks: int) -> int:
    """Run the training loop with arguments `argv` on `ranks` ranks here; -> its exit code, 128 + n after signal n.

    SIGINT and SIGTERM end the launcher and all ranks: with SIGTERM, and with SIGKILL what is left after
    `GRACE_SECONDS`.

    Raises:
        ConfigError: fewer GPUs than ranks, on a machine with GPUs.
    """
    gpus = _gpu_count()
    if 0 < gpus < ranks:
        raise ConfigError(f"--num_ranks is {ranks}, but this machine has {gpus} GPUs: start at most {gpus} ranks here")
    # A session of its own, because the launcher does not pass signals on to the ranks: its whole group gets them.
    process = subprocess.Popen(_command(argv, ranks), env=_environment(ranks, gpus), start_new_session=True)
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda received_number, _: received.append(received_number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        code = _wait(process, received)
    finally:
        _end_group(process)
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def _command(argv: Sequence[str], ranks: int) -> list[str]:
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", os.devnull, "--num_gpus", str(ranks)),
        *("--log_level", "error", "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--no_local_rank"),
        *("--module", "hmoe_ds.training.loop", *argv),
    ]


def _environment(ranks: int, gpus: int) -> dict[str, str]:
    """Defaults for the ranks' environment; what the user has set stays."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        # DeepSpeed calls a collective that newer torch has renamed, and torch says so on every rank.
        "PYTHONWARNINGS": "ignore::FutureWarning:torch.distributed.c10d_logger",
    }
    if not gpus:
        # Torch then asks for huge pages: a step allocates all its activations anew, and small pages cost it a tenth.
        defaults |= {"DS_ACCELERATOR": "cpu", "THP_MEM_ALLOC_ENABLE": "1"}
    return {**defaults, **os.environ}


def _wait(process: subprocess.Popen[bytes], received: list[int]) -> int:
    """Wait until the launcher ends, or a signal comes; -> its exit code, 0 if it still runs."""
    while not received:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
    return 0


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End every process of the launcher's group that is still there."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not _signal_group(process, number):
            return
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            process.poll()
            if not _signal_group(process, 0):
                return
            time.sleep(0.1)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Signal the launcher's group (0: nothing is sent); -> whether there was anyone left in it."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _gpu_count() -> int:
    import torch  # here, because it takes seconds, which a mistake in the configuration need not cost

    return torch.cuda.device_count()


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
