"""What a training checkpoint is, and which files belong to it. Imports no torch: checks are quick.

`checkpoint.json` says what the checkpoint is, `files.json` lists all other files with sizes and checksums. They lie
beside the training engine's own files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.contained import check_contained, contained_path
from data_pipeline.durable import flush, write_text
from data_pipeline.errors import UsageError
from data_pipeline.keys import file_checksum
from hmoe_ds.config import ConfigError, RunConfig
from hmoe_ds.config_checks import checked_config

FORMAT_VERSION = 2
RECORD_FILE, LIST_FILE = "checkpoint.json", "files.json"


class CheckpointError(UsageError):
    """A path that holds no checkpoint, or one of another version, or one that is damaged."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is not what was written: an older one may serve."""


@dataclass(frozen=True)
class CheckpointFile:
    """One file of a checkpoint.

    Args:
        name: in the checkpoint's folder.
        bytes: its size.
        blake2b: 128-bit BLAKE2b of its content, in hexadecimal.
    """

    name: str
    bytes: int
    blake2b: str

    @classmethod
    def of(cls, path: Path) -> CheckpointFile:
        """The file at `path`, which is on the disk from now on."""
        flush(path)
        return cls(path.name, path.stat().st_size, file_checksum(path))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that is meant by a run's folder or its `checkpoints` folder, the latest one; or by its own folder.

    Raises:
        CheckpointError: there is none.
    """
    for parent in (path / "checkpoints", path):
        if (parent / "latest").is_file():
            return contained_path(parent, (parent / "latest").read_text(errors="replace").strip(), parent / "latest")
    if not (path / RECORD_FILE).is_file():
        raise CheckpointError(
            f"{path} holds no checkpoint: give a run's folder, its checkpoints folder or one checkpoint in it"
        )
    return path


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Note in the checkpoint `folder` what it is: step, position in the data, configuration, dataset."""
    content = {"format_version": FORMAT_VERSION, **record}
    write_text(folder / RECORD_FILE, json.dumps(content, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """What `write_record` noted.

    Raises:
        DamagedCheckpointError: the record is missing or damaged.
        CheckpointError: it is of another version.
    """
    record = _read(folder, RECORD_FILE)
    if record.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / RECORD_FILE} has format_version {record.get('format_version')!r}, expected {FORMAT_VERSION}: "
            "use it with the version of hmoe_ds that wrote it"
        )
    missing = {"step", "config", "dataset"} - record.keys()
    if missing:
        raise CheckpointError(f"{folder / RECORD_FILE} lacks {', '.join(sorted(missing))}: use another checkpoint")
    return record


def write_list(folder: Path, files: Collection[CheckpointFile]) -> None:
    """Note in the checkpoint `folder` which files belong to it."""
    content = {"files": [asdict(file) for file in sorted(files, key=lambda file: file.name)]}
    write_text(folder / LIST_FILE, json.dumps(content, indent=1) + "\n")


def read_list(folder: Path) -> list[CheckpointFile]:
    """What `write_list` noted. Raises DamagedCheckpointError when it is missing or damaged."""
    listed, content = folder / LIST_FILE, _read(folder, LIST_FILE)
    try:
        files = [CheckpointFile(**entry) for entry in content["files"]]
        for file in files:
            check_contained(file.name, listed)
            if not isinstance(file.bytes, int) or not isinstance(file.blake2b, str):
                raise TypeError(f"{file.name} has no size and checksum")
    except (KeyError, TypeError, UsageError) as error:
        raise DamagedCheckpointError(f"{listed} is damaged ({error}): use another checkpoint") from error
    return files


def check_files(folder: Path, files: Collection[CheckpointFile], read: bool = True) -> None:
    """Compare files of a checkpoint with their sizes and checksums; without `read` with their sizes alone.

    Raises:
        DamagedCheckpointError: for the first one that is not what was written.
        OSError: one cannot be read now, whatever is in it.
    """
    for file in files:
        path = folder / file.name
        try:
            size = path.stat().st_size
            if size != file.bytes:
                raise DamagedCheckpointError(
                    f"{path} is damaged: it has {size} bytes, {file.bytes} were written; copy it again, or use another "
                    "checkpoint"
                )
            if read and file_checksum(path) != file.blake2b:
                raise DamagedCheckpointError(
                    f"{path} is damaged: its checksum is not that of what was written; copy it again, or use another "
                    "checkpoint"
                )
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{folder} lacks {file.name}: copy the whole checkpoint") from error


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedCheckpointError(
            f"{folder} lacks {name}: it is no whole checkpoint of this version of hmoe_ds; copy the whole checkpoint, "
            "or use another one"
        ) from error
    except ValueError as error:
        raise DamagedCheckpointError(f"{path} is damaged ({error}): use another checkpoint") from error
    if not isinstance(content, dict):
        raise DamagedCheckpointError(f"{path} is damaged (no JSON object): use another checkpoint")
    return content


def recorded_config(folder: Path, record: Mapping[str, Any]) -> RunConfig:
    """The configuration in a record, as `read_record` gave it.

    Raises:
        CheckpointError: it is of another version, or one that no run can have.
    """
    try:
        return checked_config(record["config"], folder / RECORD_FILE)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
