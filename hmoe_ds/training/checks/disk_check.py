"""Whether the first checkpoints of a run fit on the disk of its folder, before it has trained for hours."""

from __future__ import annotations

import shutil
from pathlib import Path

from hmoe_ds.config import ConfigError, RunConfig
from hmoe_ds.model.size import BYTES, count_parameters
from hmoe_ds.training.checkpoints.retention import remains
from hmoe_ds.training.run_folder import checkpoint_dir, tagged

_GIB = 2**30


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of a checkpoint, at least: the weights in the run's precision, fp32 copies and Adam's two moments."""
    count = count_parameters(config.model, config.router, config.objective.molecule_heads)
    return count.total * (BYTES[config.parallel.precision] + 3 * 4)


def check_disk(config: RunConfig, free: int | None = None) -> None:
    """Raise ConfigError unless two checkpoints fit, or one in a run that writes one only, or that has some already.

    Args:
        config: of the run.
        free: bytes; without it, those of the file system of `run.out`.
    """
    out = Path(config.run.out).absolute()
    if free is None:
        free = shutil.disk_usage(next(path for path in (out, *out.parents) if path.exists())).free
    checkpoints = checkpoint_dir(config)
    free += sum(file.stat().st_size for folder in remains(checkpoints) for file in folder.rglob("*") if file.is_file())
    several = 0 < config.run.checkpoint_every < config.run.steps
    number = 2 if several and not tagged(checkpoints) else 1
    size = checkpoint_bytes(config)
    if free < number * size:
        raise ConfigError(
            f"run.out {config.run.out} has {free / _GIB:.3g} GiB free, but a checkpoint of this run takes at least "
            f"{size / _GIB:.3g} GiB and it writes {'several' if several else 'one'}: make room, or give a "
            "run.out on another disk"
        )
