"""What a training checkpoint is, as JSON beside the training engine's own files. Imports no torch: checks are quick."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import UsageError
from hmoe_ds.config import ConfigError, RunConfig, config_from_dict
from hmoe_ds.config_checks import check_config

FORMAT_VERSION = 1
RECORD_FILE = "checkpoint.json"


class CheckpointError(UsageError):
    """A path that holds no checkpoint, or one that is damaged or incomplete."""


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Note in the checkpoint `folder` what it is: step, position in the data, configuration, dataset."""
    content = {"format_version": FORMAT_VERSION, **record}
    (folder / RECORD_FILE).write_text(json.dumps(content, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """What `write_record` noted.

    Raises:
        CheckpointError: the record is missing, damaged or of another version.
    """
    try:
        record = json.loads((folder / RECORD_FILE).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} lacks {RECORD_FILE}: it is no checkpoint of this version of hmoe_ds; use the one that wrote it"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / RECORD_FILE} is damaged ({error}): use another checkpoint") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / RECORD_FILE} has format_version {version!r}, expected {FORMAT_VERSION}: "
            "export it with the version of hmoe_ds that wrote it"
        )
    missing = {"step", "config", "dataset"} - record.keys()
    if missing:
        raise CheckpointError(f"{folder / RECORD_FILE} lacks {', '.join(sorted(missing))}: use another checkpoint")
    return record


def recorded_config(folder: Path, record: Mapping[str, Any]) -> RunConfig:
    """The configuration in a record, as `read_record` gave it.

    Raises:
        CheckpointError: it is of another version, or one that no run can have.
    """
    try:
        config = config_from_dict(record["config"])
        check_config(config)
    except ConfigError as error:
        raise CheckpointError(f"{folder / RECORD_FILE}: {error}") from error
    return config
