"""Save and restore a run: the engine's files, the weights on their own, and our own state beside them.

A checkpoint is written to `step<N>.partial`. When every rank has its files on the disk, their sizes and checksums are
listed, the folder gets its name and `latest` names it: whenever a run is killed, a whole checkpoint is there. What a
killed run left is removed when the next one is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from data_pipeline.durable import flush, make_folder, rename
from hmoe_ds.config import RunConfig
from hmoe_ds.model.checkpoint_record import (
    RECORD_FILE,
    CheckpointError,
    CheckpointFile,
    DamagedCheckpointError,
    check_files,
    read_list,
    read_record,
    write_list,
    write_record,
)
from hmoe_ds.model.tensor_file import write_tensors
from hmoe_ds.model.weight_files import SHARED_FILE, experts_file
from hmoe_ds.objectives.gather import gather_objects
from hmoe_ds.training.best_effort import say
from hmoe_ds.training.checkpoints.checkpoint_files import CheckpointFiles
from hmoe_ds.training.checkpoints.retention import (
    DAMAGED,
    PARTIAL,
    remove,
    remove_later,
    remove_remains,
    remove_surplus,
)
from hmoe_ds.training.checkpoints.topology import load_from_another, same_topology
from hmoe_ds.training.deepspeed_config import deepspeed_config
from hmoe_ds.training.run_folder import candidates, checkpoint_dir, checkpoint_tag, name_latest, named_latest, step_of


@dataclass
class TrainState:
    """What a run needs to go on, beside what the engine holds.

    Args:
        step: optimizer steps done.
        plan: state of the batch plan.
        skipped: of them those that changed nothing, as their gradient was not finite.
        skipped_in_a_row: the last ones of these, without a step between them that changed something.
        mlflow_run: id of the MLflow run, if there is one.
    """

    step: int
    plan: dict[str, Any]
    skipped: int = 0
    skipped_in_a_row: int = 0
    mlflow_run: str | None = None


class SaveError(OSError):
    """A checkpoint could not be written; those before it are untouched."""


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine, config: RunConfig, state: TrainState, notes: dict[str, Any]
) -> None:
    """Write checkpoint `step<N>` and make it the latest; all ranks take part.

    Args:
        engine: model and optimizer.
        config: kept inside, so that a checkpoint can be exported on its own.
        state: kept inside.
        notes: kept inside: `validation_loss`, and what an export tells of the training (`Mixture.provenance`).

    Raises:
        SaveError: on all ranks, when one of them could not write a file, such as on a full disk. The run may go on.
    """
    folder = checkpoint_dir(config) / checkpoint_tag(state.step)
    unfinished = folder.with_name(folder.name + PARTIAL)
    files = _files_of(engine)
    files.begin()
    _on_first_rank(lambda: _begin(unfinished))
    _save_weights(engine, files, unfinished, config.parallel.ep_size)
    if torch.distributed.get_rank() == 0:
        layout = {"ranks": torch.distributed.get_world_size(), "deepspeed": deepspeed_config(config)}
        record = {**asdict(state), **notes, **layout, "config": config.to_dict()}
        files.write(unfinished / RECORD_FILE, lambda path: write_record(path.parent, record))
    engine.save_checkpoint(str(unfinished.parent), tag=unfinished.name, save_latest=False)
    written = _all_written(files, unfinished)
    _on_first_rank(lambda: _complete(unfinished, folder, written, config, state.step))


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, config: RunConfig) -> TrainState:
    """Restore the newest whole checkpoint into `engine`; all ranks take part. `run_folder.check_resumable` comes first.

    Checkpoints that are found to be damaged are named on standard error, and get another name.

    Raises:
        CheckpointError: none is whole.
    """
    folder = _newest_whole(config)
    _files_of(engine)
    saved = read_record(folder)
    if same_topology(saved, config, torch.distributed.get_world_size()):
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
    else:
        load_from_another(engine, folder, config)
    return TrainState(**{field.name: saved[field.name] for field in fields(TrainState)})


def _files_of(engine: deepspeed.DeepSpeedEngine) -> CheckpointFiles:
    """What the engine writes and reads its files through; its own way runs code that a file holds."""
    if not isinstance(engine.checkpoint_engine, CheckpointFiles):
        engine.checkpoint_engine = CheckpointFiles()
        # It would copy a script beside the checkpoints, which does not work with experts.
        engine._copy_recovery_script = lambda folder: None
    return engine.checkpoint_engine


def _begin(unfinished: Path) -> None:
    make_folder(unfinished.parent)
    remove_remains(unfinished.parent)
    unfinished.mkdir()


def _complete(unfinished: Path, folder: Path, files: list[CheckpointFile], config: RunConfig, step: int) -> None:
    write_list(unfinished, files)
    flush(unfinished)
    remove(folder)  # of a run that was set back to a step before it
    rename(unfinished, folder)
    name_latest(config, step)
    _tidy(folder, config.run.keep_checkpoints, just_saved=True)


def _all_written(files: CheckpointFiles, unfinished: Path) -> list[CheckpointFile]:
    """The files of all ranks. Raises SaveError, on all of them, when one is missing."""
    rank = torch.distributed.get_rank()
    mine = (files.written, None if files.error is None else f"{files.error.strerror or files.error} on rank {rank}")
    everyone = gather_objects(mine)
    errors = [error for _, error in everyone if error]
    if errors:
        _on_first_rank(lambda: remove_remains(unfinished.parent))
        raise SaveError(f"checkpoint {unfinished} cannot be written ({errors[0]}): make room, or give another run.out")
    return [file for written, _ in everyone for file in written]


def _newest_whole(config: RunConfig) -> Path:
    """The checkpoint to go on from. Only when there is one, those that are damaged are set aside: never all of them."""
    damages: dict[Path, str] = {}
    for folder in candidates(config):
        damage = _damage(folder)
        if damage is None:
            _on_first_rank(partial(_set_aside, damages, folder, named_latest(config)))
            _on_first_rank(partial(_tidy, folder, config.run.keep_checkpoints))
            return folder
        damages[folder] = damage
    raise CheckpointError(
        f"no checkpoint in {checkpoint_dir(config)} is whole ({'; '.join(damages.values())}): copy one back, or give "
        "another run.out"
    )


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, the same on all ranks, which share the reading of it; None when nothing is.

    Raises:
        SaveError: on all ranks, when one of them cannot read, which tells nothing of the checkpoint.
    """
    damage = unreadable = None
    try:
        read_record(folder)
        check_files(folder, read_list(folder)[torch.distributed.get_rank() :: torch.distributed.get_world_size()])
    except DamagedCheckpointError as error:
        damage = str(error)
    except OSError as error:
        unreadable = f"checkpoint {folder} cannot be read on rank {torch.distributed.get_rank()} ({error})"
    everyone = gather_objects((damage, unreadable))
    for _, reason in everyone:
        if reason:
            raise SaveError(f"{reason}: mend what is wrong with the disk or the network, and start again")
    return next((damage for damage, _ in everyone if damage), None)


def _set_aside(damages: Mapping[Path, str], used: Path, latest: str | None) -> None:
    if latest not in (None, used.name, *(folder.name for folder in damages)):
        say(f"checkpoint {latest}, the latest, is gone; the run goes on from {used.name}")
    for folder, damage in damages.items():
        aside = folder.with_name(folder.name + DAMAGED)
        remove(aside)
        rename(folder, aside)
        say(
            f"checkpoint {folder.name} is damaged and was renamed to {aside.name}; the run goes on from {used.name}: "
            f"{damage}"
        )


def _tidy(folder: Path, keep: int, just_saved: bool = False) -> None:
    """Remove what is no longer needed beside a checkpoint, as far as that is possible."""
    try:
        if just_saved:
            remove_later(folder.parent, step_of(folder))
        remove_remains(folder.parent)
        remove_surplus(folder.parent, step_of(folder), keep)
    except OSError as error:  # such as a file that is open elsewhere: the next one tries again
        say(f"{folder.parent} cannot be tidied ({error})")


def _on_first_rank(action: Callable[[], None]) -> None:
    """Rank 0 does something to files, the others wait for it. Raises SaveError, on all ranks, when it cannot."""
    error: str | None = None
    if torch.distributed.get_rank() == 0:
        try:
            action()
        except OSError as problem:
            error = str(problem)
    said = [error]
    torch.distributed.broadcast_object_list(said, src=0)
    if said[0] is not None:
        raise SaveError(f"{said[0]}: make room or mend what is wrong with the disk, or give another run.out")


def _save_weights(engine: deepspeed.DeepSpeedEngine, files: CheckpointFiles, folder: Path, ep_size: int) -> None:
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
        files.write(folder / SHARED_FILE, lambda path: write_tensors(path, shared))
    if rank < ep_size:
        files.write(folder / experts_file(rank, ep_size), lambda path: write_tensors(path, experts))
