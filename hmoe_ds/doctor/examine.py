"""All checks, one after the other."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from hmoe_ds.doctor.accelerator import check_accelerator, parse_view, read_driver
from hmoe_ds.doctor.finding import Finding, problem
from hmoe_ds.doctor.folder import check_folder
from hmoe_ds.doctor.host import check_host
from hmoe_ds.doctor.network import check_network
from hmoe_ds.doctor.ops import check_build_locks, describe_ops, extensions_folder
from hmoe_ds.doctor.packages import check_declared, declared, installed
from hmoe_ds.doctor.probe import Probe, ProbeError
from hmoe_ds.doctor.ranks import RANKS, check_ranks, started_ranks

_PROBE_SECONDS = 60.0


def examine(out: Path | None) -> Iterator[Finding]:
    """Look at this machine; findings come as they are made.

    Args:
        out: folder that a run would write to; None: no folder is tried.
    """
    driver, versions = read_driver(), installed()
    nccl = driver.devices > 0 and os.environ.get("DS_ACCELERATOR") != "cpu"
    with contextlib.ExitStack() as stack:
        # What takes seconds, as it imports torch, begins beside the rest.
        torch = stack.enter_context(Probe("torch_probe"))
        training = stack.enter_context(Probe("training_probe")) if "deepspeed" in versions else None
        ranks = stack.enter_context(started_ranks("gloo"))
        yield from check_declared(declared(), versions)
        yield from check_host(os.environ)
        if out is not None:
            yield from check_folder(out)
        yield from check_network(os.environ, nccl, shutil.which)
        yield from check_build_locks(extensions_folder(os.environ, Path.home()), time.time())
        try:
            view = parse_view(torch.answer(_PROBE_SECONDS))
        except ProbeError as error:
            yield problem("torch", f"cannot be used: {error}", "", "install it anew, by the selector on its web site")
            return
        yield from check_accelerator(view, driver, os.environ)
        if training is not None:
            yield check_training(training)
        yield check_ranks("gloo", ranks, _PROBE_SECONDS)
        if nccl and len(view.gpus) >= RANKS:
            yield check_ranks("nccl", stack.enter_context(started_ranks("nccl")), _PROBE_SECONDS)


def check_training(training: Probe) -> Finding:
    """Whether all that a rank imports can be imported."""
    try:
        answer = training.answer(_PROBE_SECONDS)
    except ProbeError as error:
        return problem("training", f"a rank cannot start: {error}", "", "install what it names anew")
    return describe_ops(answer["accelerator"], answer["prebuilt"], shutil.which)
