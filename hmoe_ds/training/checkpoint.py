"""Save and restore a run: the engine's files, the weights on their own, and our own state beside them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from hmoe_ds.config import RunConfig
from hmoe_ds.model.checkpoint_record import read_record, write_record
from hmoe_ds.model.weight_files import SHARED_FILE, experts_file, write_weights
from hmoe_ds.training.engine import set_learning_rate
from hmoe_ds.training.run_folder import checkpoint_dir, checkpoint_tag, latest_checkpoint, name_latest
from hmoe_ds.training.topology import load_from_another, same_topology


@dataclass
class TrainState:
    """What a run needs to go on, beside what the engine holds.

    Args:
        step: optimizer steps done.
        plan: state of the batch plan.
    """

    step: int
    plan: dict[str, Any]


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, config: RunConfig, state: TrainState, dataset: str) -> None:
    """Write checkpoint `step<N>` and make it the latest; all ranks take part.

    Args:
        engine: model and optimizer.
        config: kept inside, so that a checkpoint can be exported on its own.
        state: kept inside.
        dataset: fingerprint of the training data, kept inside.
    """
    tag = checkpoint_tag(state.step)
    folder = checkpoint_dir(config) / tag
    folder.mkdir(parents=True, exist_ok=True)
    _save_weights(engine, folder, config.parallel.ep_size)
    if torch.distributed.get_rank() == 0:
        ranks = torch.distributed.get_world_size()
        write_record(folder, {**asdict(state), "ranks": ranks, "config": config.to_dict(), "dataset": dataset})
    engine.save_checkpoint(str(checkpoint_dir(config)), tag=tag, save_latest=False)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        name_latest(config, state.step)


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, config: RunConfig) -> TrainState:
    """Restore the latest checkpoint into `engine`; all ranks take part. `run_folder.check_resumable` comes first."""
    folder = latest_checkpoint(config)
    saved = read_record(folder)
    if same_topology(saved, config, torch.distributed.get_world_size()):
        engine.load_checkpoint(str(checkpoint_dir(config)))
    else:
        load_from_another(engine, folder, config)
    # With another run.steps the schedule is another one from here on, not only from the step after the next.
    set_learning_rate(engine, config, saved["step"])
    return TrainState(step=saved["step"], plan=saved["plan"])


def _save_weights(engine: deepspeed.DeepSpeedEngine, folder: Path, ep_size: int) -> None:
    """Rank 0 writes what all ranks share, the first `ep_size` ranks their experts."""
    rank = torch.distributed.get_rank()
    shared: dict[str, Tensor] = {}
    experts: dict[str, Tensor] = {}
    engine.empty_partition_cache()  # ZeRO-3 may still be fetching ahead, from the last forward
    for name, value in engine.module.model.state_dict(keep_vars=True).items():
        is_expert = not getattr(value, "allreduce", True)
        # Under ZeRO-3 a parameter is spread over ranks; one at a time is put together, on all of them.
        with deepspeed.zero.GatheredParameters([value], enabled=hasattr(value, "ds_id")):
            if rank < ep_size if is_expert else rank == 0:
                (experts if is_expert else shared)[name] = value.detach().to("cpu", copy=True)
    if rank == 0:
        write_weights(folder / SHARED_FILE, shared)
    if rank < ep_size:
        write_weights(folder / experts_file(rank, ep_size), experts)
