"""Whether a checkpoint is of the model that a run has: the files of another run may lie in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hmoe_ds.config import ConfigError, RunConfig
from hmoe_ds.model.checkpoint_record import read_record, recorded_config


def check_checkpoint_model(config: RunConfig, folder: Path) -> None:
    """Raise ConfigError when the checkpoint in `folder` is of another model, CheckpointError when it is damaged."""
    saved, wanted = _model(recorded_config(folder, read_record(folder))), _model(config)
    for name, value in wanted.items():
        if saved[name] != value:
            raise ConfigError(
                f"{folder} is a checkpoint of another model, with {name} {saved[name]!r}, not {value!r}: put the run's "
                "own checkpoints back, or give another run.out"
            )


def _model(config: RunConfig) -> dict[str, Any]:
    """What decides the names and shapes of the weights, and what the layers compute with them."""
    tree = config.to_dict()
    fields = {f"{section}.{name}": tree[section][name] for section in ("model", "router") for name in tree[section]}
    heads = config.objective.molecule_heads
    del fields["router.max_received"]  # how much is worked on at a time
    return fields | {
        "fingerprint head": heads.fingerprint,
        "descriptors head": heads.descriptors,
        "objective.readout": heads.readout,
    }
