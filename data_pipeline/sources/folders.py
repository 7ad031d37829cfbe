"""Folders that stand for their files: what `datasets` saved to disk, and repositories of the Hugging Face Hub."""

import json
import posixpath
from typing import Any

from data_pipeline.contained import check_contained, contained_path
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.remote import is_url
from data_pipeline.sources.formats import format_of_name

# In a repository, .txt is a licence or a list of requirements.
_NO_DATA = ".txt"


def files_in(folder: str, filesystem: Any, path: str, form: str | None) -> list[str]:
    """The data files in the folder at `path`, in the order of their rows. `folder` is its name in messages.

    A folder written by `save_to_disk` is read by its state.json, or dataset_dict.json, split after split. Of a
    repository of the Hub, all files with the extension of a known format are taken, or of the format `form`, in
    alphabetical order.

    Raises:
        UsageError: another folder, or one without data files, or one whose json files name files outside of it.
        PipelineError: its json files are damaged.
    """
    if filesystem.exists(posixpath.join(path, "dataset_dict.json")):
        splits = _json(folder, filesystem, posixpath.join(path, "dataset_dict.json"), "splits")
        record = posixpath.join(folder, "dataset_dict.json")
        parts = [check_contained(split, record) for split in splits]
        return [file for part in parts for file in _saved_files(folder, filesystem, path, part)]
    if filesystem.exists(posixpath.join(path, "state.json")):
        return _saved_files(folder, filesystem, path, "")
    if not folder.startswith("hf://"):
        raise UsageError(
            f"{folder}: not a file but a folder; name the files in it, as in {posixpath.join(folder, '*.smi')}"
        )
    files = [file for file in sorted(filesystem.find(path)) if _is_data(file, form)]
    if not files:
        raise UsageError(
            f"{folder}: no file of {f'format {form}' if form else 'a known format'} in it; name its files, as in "
            f"{posixpath.join(folder, 'data/*.parquet')}, with --format if need be"
        )
    return files


def _saved_files(folder: str, filesystem: Any, path: str, part: str) -> list[str]:
    """The files that the state.json in `part` of the folder at `path` names, `part` being '' for the folder itself."""
    state = posixpath.join(path, part, "state.json")
    entries = _json(folder, filesystem, state, "_data_files")
    try:
        names = [entry["filename"] for entry in entries]
    except (KeyError, TypeError) as error:
        raise _damaged(folder, state, error) from error
    record = posixpath.join(folder, part, "state.json")
    names = [posixpath.join(part, check_contained(name, record)) for name in names]
    if not is_url(folder):
        return [str(contained_path(path, name, record)) for name in names]
    return [posixpath.join(path, name) for name in names]


def _json(folder: str, filesystem: Any, path: str, key: str) -> list[Any]:
    """The list under a key of a json file."""
    try:
        content = json.loads(filesystem.cat_file(path))[key]
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise _damaged(folder, path, error) from error
    if not isinstance(content, list):
        raise _damaged(folder, path, f"{key} is no list")
    return content


def _damaged(folder: str, path: str, detail: object) -> PipelineError:
    return PipelineError(f"{folder}: {posixpath.basename(path)} is damaged ({detail}); save the dataset again")


def _is_data(file: str, form: str | None) -> bool:
    found = format_of_name(file)
    return found is not None and not file.lower().endswith(_NO_DATA) and form in (None, found)
