"""A checkpoint of a run: where the training was, how it is spread over files, and whether it is whole."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.quantities import byte_size
from hmoe_ds.config import ParallelConfig
from hmoe_ds.inspect.model_size import architecture, parameters, parameters_fact
from hmoe_ds.inspect.noted import noted, read_notes
from hmoe_ds.inspect.report import Report, fact, files_fact, plural
from hmoe_ds.inspect.trained import trained_facts, validation_facts
from hmoe_ds.model.checkpoint_record import (
    RECORD_FILE,
    CheckpointError,
    DamagedCheckpointError,
    check_files,
    find_checkpoint,
    read_list,
    read_record,
    recorded_config,
)
from hmoe_ds.training.run_folder import LATEST


class Kept(NamedTuple):
    """A checkpoint among those of a run.

    Attributes:
        name: of its folder.
        bytes: of its files.
        topology: how the training was spread; {} when its record cannot be read.
        validation_loss: after its step; None when there was no validation.
        files: how many its list has.
        problems: what is damaged or missing.
    """

    name: str
    bytes: int
    topology: dict[str, Any]
    validation_loss: float | None
    files: int
    problems: list[str]


def inspect_checkpoint(path: Path, verify: bool) -> Report:
    """What there is to know of the checkpoint at `path`, or of the latest one in a folder of checkpoints.

    Args:
        path: as of `find_checkpoint`.
        verify: compare the files with their checksums, not with their sizes alone.

    Raises:
        CheckpointError: `latest` names one that is not there; or it is of another version, or makes no sense.
    """
    folder = find_checkpoint(path) if (path / LATEST).is_file() else path
    if not folder.is_dir():
        raise CheckpointError(f"{path / LATEST} names {folder.name}, which is not there: give a checkpoint in {path}")
    kept = look_at(folder, verify)
    try:
        record = read_record(folder)
    except DamagedCheckpointError as error:
        figures = {"path": str(folder), **kept._asdict(), "problems": kept.problems or [str(error)]}
        lines = [fact("checkpoint", str(folder), byte_size(kept.bytes)), files_fact(0, figures["problems"], read=True)]
        return Report("checkpoint", "\n".join(lines), figures, figures["problems"])
    config, notes = recorded_config(folder, record), read_notes(record, folder / RECORD_FILE)
    figures = {
        "path": str(folder),
        "steps": config.run.steps,
        "run": config.run.out,
        "skipped_steps": noted(record, "skipped", int, folder / RECORD_FILE) or 0,
        "dataset": config.data.paths,
        "architecture": architecture(config.model, config.router),
        "parameters": parameters(config.model, config.router, config.objective.molecule_heads),
        "trained": {**notes._asdict(), "sources": [source._asdict() for source in notes.sources]},
        **kept._asdict(),
        "export": f"hmoe export {shlex.quote(str(folder))} OUT",
    }
    skipped = f"{plural(figures['skipped_steps'], 'step')} of them skipped" if figures["skipped_steps"] else ""
    lines = [
        fact("checkpoint", f"{folder}: step {notes.step:,} of {config.run.steps:,}", skipped),
        fact("run", config.run.out),
        fact("data", *config.data.paths),
        fact("topology", topology_words(kept.topology)),
        fact("model", figures["architecture"]),
        parameters_fact(figures["parameters"]),
        *trained_facts(notes),
        *validation_facts(notes.validation, config.router.groups),
        fact("size", byte_size(kept.bytes)),
        files_fact(kept.files, kept.problems, verify),
        fact("to export", figures["export"]),
    ]
    return Report("checkpoint", "\n".join(lines), figures, kept.problems)


def look_at(folder: Path, verify: bool) -> Kept:
    """A checkpoint in short; what is wrong with it is among the result."""
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    topology: dict[str, Any] = {}
    loss, files, problems = None, [], []
    try:
        record = read_record(folder)
        topology = _topology(record, recorded_config(folder, record).parallel, folder / RECORD_FILE)
        loss = noted(record, "validation_loss", float, folder / RECORD_FILE)
        files = read_list(folder)
    except CheckpointError as error:
        problems.append(str(error))
    for file in files:
        try:
            check_files(folder, [file], verify)
        except DamagedCheckpointError as error:
            problems.append(str(error))
    return Kept(folder.name, size, topology, loss, len(files), problems)


def topology_words(topology: Mapping[str, Any]) -> str:
    """How a training was spread, such as `2 ranks, ep_size 2, ZeRO 1, fp32`."""
    if not topology:
        return "topology not known"
    ranks = "ranks not noted" if topology["ranks"] is None else plural(topology["ranks"], "rank")
    words = f"{ranks}, ep_size {topology['ep_size']}, ZeRO {topology['zero_stage']}, {topology['precision']}"
    return words + (", optimizer offloaded" if topology["offload_optimizer"] else "")


def _topology(record: Mapping[str, Any], parallel: ParallelConfig, path: Path) -> dict[str, Any]:
    shown = ("ep_size", "zero_stage", "offload_optimizer", "precision")
    return {"ranks": noted(record, "ranks", int, path), **{name: asdict(parallel)[name] for name in shown}}
