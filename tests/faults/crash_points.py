"""A process that dies, or a machine that loses its power, at a chosen write, flush, rename or removal of a file.

Within `CrashPoints` all such operations below a folder are counted. At the chosen one the process "dies": half of what
was to be written is written, and no operation after it takes place. With `power` the machine dies as well: of files
that were not flushed the rest is lost, and renames whose folder was not flushed are undone.
"""

import contextlib
import io
import os
import shutil
from pathlib import Path
from unittest import mock

import hmoe_ds.model.tensor_file as tensor_file


class Death(BaseException):
    """The process is dead."""


class CrashPoints(contextlib.AbstractContextManager):
    """Counts operations on files below `folder`, and dies at number `at` (from 1; None: never).

    Attributes:
        operations: what was done, a line each.
    """

    def __init__(self, folder: Path, at: int | None = None, power: bool = False) -> None:
        self.folder, self.at, self.power = folder.resolve(), at, power
        self.operations: list[str] = []
        self.dead = False
        self._flushed: dict[Path, int] = {}  # bytes of files that were written here
        self._renames: list[tuple[Path, Path, bytes | None]] = []  # whose folder was not flushed
        self._real = {name: getattr(os, name) for name in ("fsync", "replace", "mkdir", "unlink", "rmdir")}
        self._open, self._save_file = io.open, tensor_file.save_file
        self._paths: dict[int, Path] = {}

    def __enter__(self) -> "CrashPoints":
        self._patches = contextlib.ExitStack()
        for name in self._real:
            self._patches.enter_context(mock.patch.object(os, name, getattr(self, f"_{name}")))
        self._patches.enter_context(mock.patch.object(io, "open", self._opened))
        self._patches.enter_context(mock.patch.object(tensor_file, "save_file", self._saved))
        return self

    def __exit__(self, kind, error, trace) -> bool:
        self._patches.close()
        if self.dead and self.power:
            self._lose_power()
        return self.dead

    def _reach(self, what: str) -> bool:
        """Count an operation; -> whether the process dies in it."""
        if self.dead:
            raise Death
        self.operations.append(what)
        self.dead = len(self.operations) == self.at
        return self.dead

    def _step(self, what: str) -> None:
        if self._reach(what):
            raise Death

    def _is_watched(self, path) -> bool:
        return (not isinstance(path, int) and self.folder in (absolute := Path(path).absolute()).parents) or (
            not isinstance(path, int) and absolute == self.folder
        )

    def _opened(self, file, mode="r", *arguments, **keywords):
        if not self._is_watched(file) or not set(mode) & set("wax"):
            return self._open(file, mode, *arguments, **keywords)
        self._step(f"open {file}")
        path = Path(file).absolute()
        if "a" not in mode:
            self._flushed[path] = 0
        else:
            self._flushed.setdefault(path, path.stat().st_size if path.exists() else 0)
        return _File(self, self._open(file, mode, *arguments, **keywords), path)

    def written(self, file: "_File", content) -> int:
        """`content` goes into a file."""
        if self._reach(f"write {len(content)} to {file.path}"):
            file.file.write(content[: len(content) // 2])
            file.file.flush()
            raise Death
        return file.file.write(content)

    def _saved(self, tensors, path, metadata) -> None:
        dies = self._reach(f"save {path}")
        self._save_file(tensors, path, metadata)
        self._flushed[Path(path).absolute()] = 0
        if dies:
            os.truncate(path, Path(path).stat().st_size // 2)
            raise Death

    def _fsync(self, descriptor) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not self._is_watched(path):
            self._real["fsync"](descriptor)
            return
        self._step(f"flush {path}")
        if path.is_dir():
            self._renames = [rename for rename in self._renames if rename[1].parent != path]
        else:
            self._flushed[path] = path.stat().st_size

    def _replace(self, source, target, **keywords) -> None:
        if not self._is_watched(target):
            self._real["replace"](source, target, **keywords)
            return
        self._step(f"rename {source} to {target}")
        source, target = Path(source).absolute(), Path(target).absolute()
        before = target.read_bytes() if target.is_file() else None
        self._real["replace"](source, target)
        self._renames.append((source, target, before))
        for path in list(self._flushed):
            if path == source or source in path.parents:
                self._flushed[target / path.relative_to(source)] = self._flushed.pop(path)

    def _mkdir(self, path, *arguments, **keywords) -> None:
        if self._is_watched(path):
            self._step(f"make folder {path}")
        self._real["mkdir"](path, *arguments, **keywords)

    def _unlink(self, path, *arguments, **keywords) -> None:
        if keywords.get("dir_fd") is not None or self._is_watched(path):  # the removal of a tree works by descriptors
            self._step(f"remove {path}")
        self._real["unlink"](path, *arguments, **keywords)

    def _rmdir(self, path, *arguments, **keywords) -> None:
        if keywords.get("dir_fd") is not None or self._is_watched(path):
            self._step(f"remove folder {path}")
        self._real["rmdir"](path, *arguments, **keywords)

    def _lose_power(self) -> None:
        for path, size in self._flushed.items():
            if path.is_file() and path.stat().st_size > size:
                os.truncate(path, size)
        for source, target, before in reversed(self._renames):
            if target.exists() and not source.exists():
                os.replace(target, source)
                if before is not None:
                    target.write_bytes(before)


class _File:
    """A file that is written to; everything else goes to the real one."""

    def __init__(self, points: CrashPoints, file, path: Path) -> None:
        self.points, self.file, self.path = points, file, path

    def write(self, content) -> int:
        return self.points.written(self, content)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.file.close()


def leave_nothing(folder: Path) -> None:
    """Remove a folder of a run, to begin anew."""
    shutil.rmtree(folder, ignore_errors=True)
