"""Steps whose gradient is not finite: they change nothing, and what they looked at is written down.

DeepSpeed finds such a gradient, on all ranks, and leaves parameters and optimizer as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.durable import append_line, flush
from data_pipeline.errors import PipelineError
from hmoe_ds.config import RunConfig
from hmoe_ds.objectives.gather import gather_objects
from hmoe_ds.objectives.total import RankSlice
from hmoe_ds.run_files import SKIPPED
from hmoe_ds.training.best_effort import BestEffort, say


class DivergedError(PipelineError):
    """The gradient was not finite in too many steps in a row."""


def record_skipped(config: RunConfig, step: int, in_a_row: int, loss: Tensor, slices: list[RankSlice]) -> None:
    """Write down a step that was skipped; all ranks take part.

    `skipped.jsonl` gets a line with the loss and the keys of all molecules of the global batch, in the order of ranks.
    With `run.resume` the same batch is dealt again, so a run that is started again replays it.

    Args:
        config: of the run.
        step: that was skipped, from 1.
        in_a_row: how many the last steps were, this one included.
        loss: of the global batch.
        slices: this rank's part of it.

    Raises:
        DivergedError: on all ranks, after `run.max_skipped` in a row.
    """
    mine = [key.tobytes().hex() for part in slices for key in part.batch.mol_key_B2.cpu().numpy()]
    everyone = gather_objects(mine)
    file = Path(config.run.out) / SKIPPED
    if torch.distributed.get_rank() == 0:
        line = {"step": step, "loss": repr(loss.item()), "mol_keys": [key for keys in everyone for key in keys]}
        with BestEffort(str(file)):
            append_line(file, json.dumps(line))
            flush(file)
        say(f"step {step}: the gradient is not finite, the step is skipped ({in_a_row} in a row)", sys.stdout)
    if in_a_row >= config.run.max_skipped:
        raise DivergedError(
            f"the gradient was not finite in {in_a_row} steps in a row, up to step {step}; their molecules are in "
            f"{file}: lower optim.learning_rate, or look at these molecules, and start from a checkpoint before them"
        )
