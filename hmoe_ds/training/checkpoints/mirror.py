"""A copy of a run's last checkpoint in object storage, for when the disk goes with the machine.

Rank 0 copies each checkpoint to `run.mirror` while the training goes on; `latest` is replaced when all of it is there,
then the one before is removed. A machine whose run folder has no checkpoint gets it back before the ranks start:
`hmoe pretrain` does so, on a cluster `python -m hmoe_ds.training.checkpoints.mirror RUN URL`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipeline.contained import check_contained
from data_pipeline.durable import flush, make_folder, rename, replace_text
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.remote import join_url, one_line, open_filesystem
from hmoe_ds.config import RunConfig
from hmoe_ds.model.checkpoint_record import LIST_FILE, check_files, read_list
from hmoe_ds.run_files import ALLOCATION, LOAD, METRICS, RECORD, SKIPPED
from hmoe_ds.training.best_effort import say
from hmoe_ds.training.checkpoints.retention import PARTIAL, remove_remains
from hmoe_ds.training.recording.spool import DELIVERY
from hmoe_ds.training.run_folder import CHECKPOINTS, LATEST, checkpoint_tag, is_tag, tagged
from hmoe_ds.training.stopping.stop import StoppedError

# Small files of the run's folder: what it is, what it logged, what MLflow has of that.
_BESIDE = (RECORD, METRICS, LOAD, ALLOCATION, SKIPPED, DELIVERY)
MIRRORING = "mirroring"


class Mirror:
    """Copies checkpoints in the context of this object, on rank 0; at its end it waits for what is under way.

    Args:
        config: of the run; without `run.mirror` nothing is done.
        step: of the checkpoint from which this start goes on. It is copied if it is not there, as that may have failed.
        rank: this rank.
        waiting: is called every second while the end of a run waits for its copy.
    """

    def __init__(self, config: RunConfig, step: int, rank: int, waiting: Callable[[], None] = lambda: None) -> None:
        self._waiting, self._limit = waiting, config.run.hang_seconds
        self._url, self._out = config.run.mirror, Path(config.run.out)
        self._step = step
        self._thread = ThreadPoolExecutor(1, "mirror") if self._url and rank == 0 else None
        self._copying: Future[None] | None = None
        self._pinned = self._out

    def __enter__(self) -> Mirror:
        if self._thread is not None:
            shutil.rmtree(self._out / MIRRORING, ignore_errors=True)
        if self._step:
            self.push(self._step)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        """Raises PipelineError, if nothing else went wrong, when the last checkpoint could not be copied.

        That may take `run.hang_seconds`; the other ranks wait. After an error nobody waits: the next start copies it.
        """
        if self._thread is None or self._copying is None:
            return
        if kind not in (None, StoppedError):
            self._thread.shutdown(wait=False, cancel_futures=True)
            return
        deadline = time.monotonic() + self._limit
        while not self._copying.done() and time.monotonic() < deadline:
            self._waiting()
            wait([self._copying], timeout=1.0)
        failure: BaseException | None = PipelineError(
            f"the last checkpoint was not copied to run.mirror {self._url} in {self._limit:g} s: start the run again"
        )
        if self._copying.done():
            failure = self._copying.exception()
        self._thread.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self._out / MIRRORING, ignore_errors=True)
        if failure is not None and kind is None:
            raise failure

    def push(self, step: int) -> None:
        """Copy the checkpoint after `step` steps, after one that is being copied, and instead of one that waits for it.

        When that fails, it is said, and the next checkpoint is tried.
        """
        if self._thread is None:
            return
        if self._copying is not None and self._copying.cancel():
            shutil.rmtree(self._pinned, ignore_errors=True)
        name = checkpoint_tag(step)
        # Its files under other names, so that it may be removed while they are copied.
        self._pinned = self._out / MIRRORING / name
        try:
            shutil.copytree(self._out / CHECKPOINTS / name, self._pinned, copy_function=_link_or_copy)
        except OSError as error:  # as on a full disk; the training is more important
            say(f"checkpoint {name} is not copied to run.mirror {self._url}: {error}")
            return
        self._copying = self._thread.submit(self._copy, self._pinned)

    def _copy(self, pinned: Path) -> None:
        try:
            _upload(self._out, pinned, self._url)
        except Exception as error:  # storage libraries share no base class
            failure = PipelineError(
                f"checkpoint {pinned.name} was not copied to run.mirror {self._url} ({one_line(error)}): the next one "
                "is tried, or this one when the run is started again"
            )
            say(str(failure))
            raise failure from error
        finally:
            shutil.rmtree(pinned, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _upload(out: Path, checkpoint: Path, url: str) -> None:
    name = checkpoint.name
    filesystem, root = open_filesystem(url)
    filesystem.invalidate_cache()
    folder = join_url(root, CHECKPOINTS)
    target = join_url(folder, name)
    latest = join_url(folder, LATEST)
    if _read_latest(filesystem, latest) == name:
        return
    filesystem.makedirs(target, exist_ok=True)
    for file in [*read_list(checkpoint), None]:  # the list last
        entry = LIST_FILE if file is None else file.name
        filesystem.put_file(str(checkpoint / entry), join_url(target, entry))
    for entry in _BESIDE:
        if (out / entry).exists():
            filesystem.put_file(str(out / entry), join_url(root, entry))
    filesystem.pipe_file(latest, name.encode())
    for path in filesystem.ls(folder, detail=False):
        other = path.rstrip("/").rsplit("/", 1)[-1]
        if is_tag(other) and other != name:
            filesystem.rm(path, recursive=True)


def fetch(out: Path, url: str) -> str | None:
    """Bring the checkpoint at `url` into a run's folder that has none; -> its name, None when nothing was to be done.

    Raises:
        PipelineError: it cannot be read, or is not what was written.
    """
    folder = out / CHECKPOINTS
    if tagged(folder):
        return None
    filesystem, root = open_filesystem(url)
    try:
        name = _read_latest(filesystem, join_url(join_url(root, CHECKPOINTS), LATEST))
        if name is None:
            return None
        make_folder(folder)
        remove_remains(folder)
        partial = folder / (name + PARTIAL)
        partial.mkdir()
        source = join_url(join_url(root, CHECKPOINTS), name)
        filesystem.get_file(join_url(source, LIST_FILE), str(partial / LIST_FILE))
        files = read_list(partial)
        for file in files:
            filesystem.get_file(join_url(source, file.name), str(partial / file.name))
            flush(partial / file.name)
        for entry in _BESIDE:
            if filesystem.exists(join_url(root, entry)):
                filesystem.get_file(join_url(root, entry), str(out / entry))
    except UsageError:
        raise
    except Exception as error:
        raise PipelineError(
            f"run.mirror {url} cannot be read ({one_line(error)}): check it, and start again"
        ) from error
    check_files(partial, files)
    flush(partial)
    rename(partial, folder / name)
    replace_text(folder / LATEST, name)
    return name


def _read_latest(filesystem: Any, path: str) -> str | None:
    """Name of the checkpoint at a mirror; None when there is none."""
    if not filesystem.exists(path):
        return None
    name = filesystem.cat_file(path).decode(errors="replace").strip()
    if not is_tag(name):
        raise UsageError(f"{path} holds {name[:80]!r}, which is no checkpoint's name: give another run.mirror")
    return check_contained(name, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command; -> its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hmoe_ds.training.checkpoints.mirror",
        description="Bring a run's last checkpoint back from its mirror.",
    )
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="the run's folder; nothing is done if it has a checkpoint"
    )
    parser.add_argument("url", metavar="URL", help="run.mirror of the run")
    options = parser.parse_args(argv)
    try:
        name = fetch(options.run, options.url)
    except PipelineError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(f"{options.run}: " + (f"{name} was brought back from {options.url}" if name else "nothing to be done"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
