"""Which checkpoints are kept: the last ones and the best one. What is not is removed so that no half of it is left."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hmoe_ds.model.checkpoint_record import CheckpointError, read_record
from hmoe_ds.training.run_folder import step_of, tagged

# End of the name of a folder that is no checkpoint yet, of one that no longer is, and of one in another form.
PARTIAL, REMOVED, UNIVERSAL = ".partial", ".removed", ".universal"
# And of a checkpoint that was found to be damaged; it is left to look at.
DAMAGED = ".damaged"


def remove_surplus(folder: Path, step: int, keep: int) -> None:
    """Remove checkpoints that a run no longer needs.

    Kept are the last `keep` ones (0: all) and the one with the lowest validation loss of those that were validated.

    Args:
        folder: of the run's checkpoints.
        step: of the run's last one; later ones are left alone.
        keep: how many.
    """
    mine = [path for path in tagged(folder) if step_of(path) <= step]
    if keep:
        best = best_checkpoint(mine)
        for path in mine[keep:]:
            if path != best:
                remove(path)


def remove_later(folder: Path, step: int) -> None:
    """Remove checkpoints after `step`: the run was set back to one before them by hand, and makes them again."""
    for path in tagged(folder):
        if step_of(path) > step:
            remove(path)


def best_checkpoint(checkpoints: list[Path]) -> Path | None:
    """The one with the lowest validation loss; of equals the first. None when none was validated."""
    losses = {}
    for path in checkpoints:
        try:
            loss = read_record(path)["validation_loss"]
        except CheckpointError:  # what it is worth nobody knows
            continue
        if loss is not None:
            losses[path] = loss
    return min(losses, key=losses.__getitem__) if losses else None


def remove(path: Path) -> None:
    """Remove a checkpoint, if it is there. What has the name of a checkpoint is never half of one."""
    if path.exists():
        removed = path.with_name(path.name + REMOVED)
        if removed.exists():
            shutil.rmtree(removed)
        os.replace(path, removed)
        shutil.rmtree(removed)


def remains(folder: Path) -> list[Path]:
    """What a run that was killed left of checkpoints that it wrote, removed or loaded."""
    return [path for suffix in (PARTIAL, REMOVED, UNIVERSAL) for path in folder.glob(f"*{suffix}")]


def remove_remains(folder: Path) -> None:
    """Remove them, as far as that is possible: a file may still be open elsewhere."""
    for path in remains(folder):
        shutil.rmtree(path, ignore_errors=True)
