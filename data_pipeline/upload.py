"""A dataset folder -> object storage, the manifest last, so that a URL that has one holds a complete dataset."""

from pathlib import Path
from typing import Any

from data_pipeline.durable import atomically
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.manifest import MANIFEST_FILE, FileRecord, Manifest, file_path
from data_pipeline.remote import join_url, one_line, open_filesystem, permanent_error

# Files that were uploaded already, a line of "checksum name" each.
_UPLOADED_FILE = ".hmoe_uploaded"
# At the URL, while a dataset is uploaded: which one, by the name of the folder it comes from.
_MARKER = ".hmoe_upload"


def holds_dataset(url: str) -> bool:
    """True if there is a manifest at the URL.

    Raises:
        UsageError: an unknown protocol.
        PipelineError: the storage cannot be asked.
    """
    filesystem, path = open_filesystem(join_url(url, MANIFEST_FILE))
    try:
        return filesystem.exists(path)
    except Exception as error:  # storage libraries share no base class
        raise _failed(url, error) from error


def upload(folder: Path, url: str) -> None:
    """Copy the dataset in `folder` to `url`, in place of one that is there.

    Interrupted, the same again goes on with the file it was at.

    Raises:
        PipelineError: the storage refuses a file.
    """
    new = Manifest.load(folder).all_files
    filesystem, path = open_filesystem(url)
    try:
        old = Manifest.load(url).all_files if holds_dataset(url) else []
    except UsageError:
        # Of another format version, say: its files cannot be told, and those of the same names are replaced.
        old = []
    try:
        _mark(folder, filesystem, path)
        if filesystem.exists(join_url(path, MANIFEST_FILE)):
            filesystem.rm_file(join_url(path, MANIFEST_FILE))
        _copy(folder, new, filesystem, path)
        for file in {record.file for record in old} - {record.file for record in new}:
            filesystem.rm_file(join_url(path, file))
        filesystem.rm_file(join_url(path, _MARKER))
        _put(folder / MANIFEST_FILE, MANIFEST_FILE, filesystem, path)
    except Exception as error:  # storage libraries share no base class
        raise _failed(url, error) from error


def _mark(folder: Path, filesystem: Any, path: str) -> None:
    """Claim the URL. What was uploaded before counts only if no other dataset has claimed it since."""
    marker = join_url(path, _MARKER)
    if not filesystem.exists(marker) or filesystem.cat_file(marker) != folder.name.encode():
        (folder / _UPLOADED_FILE).unlink(missing_ok=True)
        filesystem.makedirs(path, exist_ok=True)
        filesystem.pipe_file(marker, folder.name.encode())


def _copy(folder: Path, records: list[FileRecord], filesystem: Any, path: str) -> None:
    log = folder / _UPLOADED_FILE
    uploaded = log.read_text().splitlines() if log.exists() else []
    for record in records:
        line = f"{record.blake2b} {record.file}"
        if line in uploaded:
            continue
        _put(file_path(folder, record), record.file, filesystem, path)
        uploaded.append(line)
        with atomically(str(log)) as temporary:
            Path(temporary).write_text("\n".join(uploaded))


def _put(source: Path, file: str, filesystem: Any, path: str) -> None:
    target = join_url(path, file)
    filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
    filesystem.put_file(str(source), target)


def _failed(url: str, error: Exception) -> PipelineError:
    return permanent_error(url, error) or PipelineError(
        f"{url}: cannot be written ({one_line(error)}); check the network, the endpoint and the permissions, then run "
        "again: what is done is kept"
    )
