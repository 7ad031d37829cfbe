"""Whether the first checkpoints of a run fit on the disk of its folder, before it has trained for hours."""

from __future__ import annotations

import shutil
from pathlib import Path

from hmoe_ds.config import ConfigError, RunConfig
from hmoe_ds.model.size import BYTES, count_parameters

_GIB = 2**30


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of a checkpoint, at least: the weights in the run's precision, fp32 copies and Adam's two moments."""
    count = count_parameters(config.model, config.router, config.objective.molecule_heads)
    return count.total * (BYTES[config.parallel.precision] + 3 * 4)


def check_disk(config: RunConfig, free: int | None = None) -> None:
    """Raise ConfigError unless two checkpoints fit, or one in a run that writes one only.

    Args:
        config: of the run.
        free: bytes; without it, those of the file system of `run.out`.
    """
    out = Path(config.run.out).absolute()
    if free is None:
        free = shutil.disk_usage(next(path for path in (out, *out.parents) if path.exists())).free
    number = 2 if 0 < config.run.checkpoint_every < config.run.steps else 1
    size = checkpoint_bytes(config)
    if free < number * size:
        raise ConfigError(
            f"run.out {config.run.out} has {free / _GIB:.3g} GiB free, but a checkpoint of this run takes at least "
            f"{size / _GIB:.3g} GiB and it writes {'several' if number > 1 else 'one'}: make room, or give a "
            "run.out on another disk"
        )
