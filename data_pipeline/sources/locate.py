"""The files behind a path, a URL, a pattern of either, or a folder of `datasets` or of the Hugging Face Hub."""

import glob
import os
import posixpath
from dataclasses import dataclass
from typing import Any

import fsspec

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.redact import without_credentials
from data_pipeline.remote import is_url, open_filesystem
from data_pipeline.sources.folders import files_in
from data_pipeline.sources.streams import file_name, has_wildcard, storage_error


@dataclass(frozen=True)
class Location:
    """A file: its path or URL, and a short name, which is the same on every machine."""

    name: str
    path: str


def locate(name: str, form: str | None) -> list[Location]:
    """The files behind a name; of a pattern, in alphabetical order. `form` as in `folders.files_in`.

    Raises:
        UsageError: nothing there, a folder that is neither of the two, an unknown protocol.
        PipelineError: the storage cannot be read, or the folder is damaged.
    """
    found = _remote(name, form) if is_url(name) else _local(name, form)
    if not found:
        raise UsageError(f"{name}: no such file; expected a path, a URL, a pattern, nci5k or synth:N (docs/sources.md)")
    return found


def _local(name: str, form: str | None) -> list[Location]:
    filesystem = fsspec.filesystem("file")
    # A file whose name holds a bracket is a file first, and a pattern second.
    paths = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
    locations = []
    for path in paths:
        if os.path.isdir(path):
            locations += _in_folder(path, filesystem, path, form)
        elif os.path.isfile(path):
            locations.append(_file(path))
        else:
            # A pipe, say: what has to be read twice, for its checksum and for its rows.
            raise UsageError(f"{path}: not a file that can be read twice; write its content to a file and name that")
    return locations


def _remote(url: str, form: str | None) -> list[Location]:
    filesystem, path = open_filesystem(url)
    try:
        if not has_wildcard(url) or filesystem.exists(path):
            return _at(url, filesystem, path, filesystem.info(path), form)
        entries = sorted(filesystem.glob(path, detail=True).items())
        return [
            location
            for path, info in entries
            for location in _at(filesystem.unstrip_protocol(path), filesystem, path, info, form)
        ]
    except PipelineError:
        raise
    except Exception as error:  # storage libraries share no base class
        raise storage_error(url, error) from error


def _at(url: str, filesystem: Any, path: str, info: dict[str, Any], form: str | None) -> list[Location]:
    return _in_folder(url, filesystem, path, form) if info["type"] == "directory" else [_file(url)]


def _file(path: str) -> Location:
    return Location(file_name(path), path)


def _in_folder(folder: str, filesystem: Any, path: str, form: str | None) -> list[Location]:
    """The files in a folder, named from the folder's own name on."""
    folder, path = folder.rstrip("/"), path.rstrip("/")
    files = [posixpath.relpath(file, path) for file in files_in(folder, filesystem, path, form)]
    base = posixpath.basename(os.path.abspath(folder) if not is_url(folder) else without_credentials(folder))
    return [Location(posixpath.join(base, file), posixpath.join(folder, file)) for file in files]
