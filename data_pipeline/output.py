"""The output folder: what may be written there, what may be removed, and when a dataset appears in it.

A dataset is built inside `OUT/.hmoe_prepare` and moved into place at the end, the manifest last: a folder with a
manifest holds a complete dataset, and a run that fails leaves an earlier dataset untouched. An append adds shards under
new names and then replaces the small files, the manifest last.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import UsageError
from data_pipeline.manifest import MANIFEST_FILE, Manifest, is_dataset
from data_pipeline.schema import SPLITS

SCAFFOLDS_FILE = "scaffolds.parquet"
REJECTS_FILE = "rejects.parquet"

_WORK_FOLDER = ".hmoe_prepare"
# In the order in which they are moved into place.
_DATASET_ENTRIES = ("dataset_dict.json", *SPLITS, SCAFFOLDS_FILE, REJECTS_FILE, MANIFEST_FILE)


def check_writable(out: Path) -> None:
    """A dataset may be written into a new or empty folder, an interrupted one, or over another dataset of ours.

    Raises:
        UsageError: the folder holds something else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: a file; expected a folder to write a dataset into")
    entries = os.listdir(out)
    if entries and _WORK_FOLDER not in entries and not (MANIFEST_FILE in entries and is_dataset(out)):
        raise UsageError(f"{out}: holds something that is not a dataset; choose another --out")


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """A fresh folder inside `out` for the files of a run, removed at the end whatever happens.

    `out` itself goes too when the run has left nothing in it.
    """
    work = out / _WORK_FOLDER
    if work.exists():
        # What an interrupted run left.
        shutil.rmtree(work)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work)
        if not any(out.iterdir()):
            out.rmdir()


def publish(built: Path, out: Path) -> None:
    """Move a dataset that is complete in `built` into `out`, in place of an earlier one."""
    for name in reversed(_DATASET_ENTRIES):
        _remove(out / name)
    for name in _DATASET_ENTRIES:
        os.replace(built / name, out / name)


def publish_append(built: Path, out: Path, old: Manifest, new: Manifest) -> None:
    """Move what is new of the dataset `new`, built in `built`, into `out`, which holds `old`.

    A file of `old` is replaced as a whole or not at all, and its shards are left alone. A run killed here is mended by
    the same append again: until the manifest is replaced, the dataset is the old one.
    """
    old_shards = {shard.file for split in old.splits.values() for shard in split.shards}
    for split in SPLITS:
        for path in (out / split).glob("data-*.arrow"):
            if f"{split}/{path.name}" not in old_shards:
                # What a killed append left.
                path.unlink()
    new_shards = [shard.file for split in new.splits.values() for shard in split.shards if shard.file not in old_shards]
    for file in (*new_shards, *(record.file for record in new.files), MANIFEST_FILE):
        os.replace(built / file, out / file)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
