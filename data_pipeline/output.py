"""The output folder: what may be written there, what may be removed, and when a dataset appears in it.

A dataset is built inside `OUT/.hmoe_prepare` and moved into place at the end, the manifest last: a folder with a
manifest holds a complete dataset, and a run that fails leaves an earlier dataset untouched. An append adds shards under
new names and then replaces the small files, the manifest last.

What a run that failed or was killed leaves in `.hmoe_prepare` are tasks with their records (`task`), which the next run
takes over as far as they are its own. Of a dataset that is built, the plan of what to move is written first, so a run
killed while it moves is mended by the next one.
"""

import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from data_pipeline.contained import check_contained
from data_pipeline.durable import atomically, flush, make_folder, write_text
from data_pipeline.errors import UsageError
from data_pipeline.execution.records import to_bytes
from data_pipeline.execution.task import read_record, work_file
from data_pipeline.manifest import MANIFEST_FILE, Manifest, is_dataset
from data_pipeline.schema import SPLITS

Result = TypeVar("Result")

SCAFFOLDS_FILE = "scaffolds.parquet"
REJECTS_FILE = "rejects.parquet"

WORK_FOLDER = ".hmoe_prepare"
_LOCK_FILE = "lock"


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
    if entries and WORK_FOLDER not in entries and not (MANIFEST_FILE in entries and is_dataset(out)):
        raise UsageError(f"{out}: holds something that is not a dataset; choose another --out")


@dataclass
class WorkFolder:
    """The folder for the files of a run. `keep`: leave it for the next run, should this one fail."""

    path: Path
    keep: bool

    def dataset(self, key: str) -> Path:
        """Where the small files of the dataset `key` are written."""
        path = Path(work_file(str(self.path), "dataset", key))
        for split in SPLITS:
            (path / split).mkdir(parents=True, exist_ok=True)
        return path


@contextmanager
def work_folder(out: Path) -> Iterator[WorkFolder]:
    """The work folder inside `out`, held by this process alone.

    It is removed at the end, or kept when an error leaves work in it that is worth keeping; `out` itself goes too when
    this made it and nothing is left in it.

    Raises:
        UsageError: another process is at work in `out`; or the work folder is a link to another place.
    """
    path = out / WORK_FOLDER
    if path.is_symlink():  # what is in it is removed
        raise UsageError(f"{path}: a link to {os.readlink(path)}; expected a folder of its own; remove the link")
    interrupted = path.exists()
    is_new = not out.exists()
    make_folder(path)
    with open(path / _LOCK_FILE, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{out}: another command is at work there; wait for it, or end it") from error
        work = WorkFolder(path, keep=interrupted)
        try:
            yield work
        except BaseException:
            if not work.keep:
                _remove_work(out)
                if is_new:
                    with suppress(OSError):  # not empty
                        out.rmdir()
            raise
        _remove_work(out)


def remove_leftovers(out: Path) -> None:
    """Remove the work folder of a run that was killed after its dataset was in place."""
    path = out / WORK_FOLDER
    publications = [file.name.removeprefix("publication-") for file in path.glob("publication-*")]
    if any(Publication.load(path, key) is None for key in publications):
        with work_folder(out):
            pass  # it is removed at the end


def _remove_work(out: Path) -> None:
    # What tells that it may be removed goes last, should a kill come in between.
    path = out / WORK_FOLDER
    for entry in path.iterdir():
        if not entry.name.startswith("publication-"):
            _remove(entry)
    shutil.rmtree(path)


@dataclass(frozen=True)
class Publication(Generic[Result]):
    """What is left to do for a dataset that is built.

    key: names the dataset; result: of the run; remove: entries of the output folder that go first; moves: (file in the
    work folder, file in the output folder), the manifest last.
    """

    key: str
    result: Result
    remove: list[str]
    moves: list[tuple[str, str]]

    def save(self, work: Path) -> None:
        """From now on, a run that is killed is mended by `publish` alone.

        The files to move are on the disk; here their names get there.
        """
        _removed_file(work, self.key).unlink(missing_ok=True)
        for folder in {work, *((work / built).parent for built, _ in self.moves)}:
            flush(folder)
        with atomically(_publication_file(work, self.key)) as temporary:
            Path(temporary).write_bytes(to_bytes(self))

    @classmethod
    def load(cls, work: Path, key: str) -> "Publication[Any] | None":
        """The publication of the dataset `key`; None if it is not built, or in place already.

        Raises:
            UsageError: it names files outside of the folders.
        """
        publication = read_record(_publication_file(work, key))
        if publication is None:
            return None
        for name in (*publication.remove, *itertools.chain(*publication.moves)):
            check_contained(name, _publication_file(work, key))
        last, _ = publication.moves[-1]
        return publication if (work / last).exists() else None

    def publish(self, work: Path, out: Path) -> None:
        """Move the dataset into `out`. The same again finishes what a kill has interrupted."""
        removed = _removed_file(work, self.key)
        if not removed.exists():
            for name in self.remove:
                _remove(out / name)
                flush((out / name).parent)
            # For good before the first move, or what was moved would be removed.
            write_text(removed, "")
            flush(work)
        for split in SPLITS:
            make_folder(out / split)
        *files, (built_manifest, manifest) = self.moves
        for built, file in files:
            _move(work / built, out / file)
        for folder in (out, *(out / split for split in SPLITS)):
            flush(folder)
        _move(work / built_manifest, out / manifest)
        flush(out)


def entries_to_replace() -> list[str]:
    """What goes from the output folder before a new dataset is moved into it: the manifest first."""
    return [MANIFEST_FILE, "dataset_dict.json", *SPLITS, SCAFFOLDS_FILE, REJECTS_FILE]


def stray_shards(out: Path, manifest: Manifest) -> list[str]:
    """Shards in the folder of a dataset that its manifest does not list: what an append, killed there, left."""
    listed = {shard.file for shard in manifest.shards}
    files = [f"{split}/{path.name}" for split in SPLITS for path in sorted((out / split).glob("data-*.arrow"))]
    return [file for file in files if file not in listed]


def _removed_file(work: Path, key: str) -> Path:
    return Path(work_file(str(work), "removed", key))


def _publication_file(work: Path, key: str) -> str:
    return work_file(str(work), "publication", key)


def _move(built: Path, file: Path) -> None:
    """It may be done already."""
    if built.exists():
        os.replace(built, file)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
