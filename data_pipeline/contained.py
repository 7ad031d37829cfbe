"""Names of files that a folder's own records give: none of them may lead out of the folder.

Datasets come from others, as folders or behind URLs, and their manifests say which files to read, to copy and to
replace.
"""

import os
from pathlib import Path

from data_pipeline.errors import UsageError


def check_contained(name: object, record: str | Path) -> str:
    """`name`, if it is that of a file in the folder of `record`: parts between slashes, none of which leads upwards.

    Args:
        name: of a file, as a record has it.
        record: the file that says so, for the message.

    Raises:
        UsageError: it is no such name.
    """
    if (
        not isinstance(name, str)
        or not name.isprintable()  # no NUL, no line break
        or "\\" in name
        or any(part in ("", ".", "..") for part in name.split("/"))
    ):
        raise UsageError(
            f"{record}: names the file {repr(name)[:80]}, which is not inside its folder; do not use this "
            "folder, and get it again from where it was made"
        )
    return name


def contained_path(folder: str | Path, name: str, record: str | Path) -> Path:
    """The path of the file `name`, checked by `check_contained`, in a folder of this machine.

    Raises:
        UsageError: a symbolic link takes it out of the folder.
    """
    path = Path(folder) / check_contained(name, record)
    root = os.path.realpath(folder)
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise UsageError(
            f"{record}: names the file {name!r}, which is a link to {os.path.realpath(path)}, outside its folder; put "
            "the file itself into the folder"
        )
    return path
