"""Files that are there as a whole, for good, or as they were."""

import errno
import os
from pathlib import Path

import pytest

from data_pipeline.durable import atomically, flush
from tests.faults.crash_points import CrashPoints


@pytest.mark.parametrize("aside", [None, "folder/aside"])
def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_after(aside: str | None, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with CrashPoints(tmp_path) as points, atomically(tmp_path / "x", aside and tmp_path / aside) as temporary:
        Path(temporary).write_text("whole")
    assert [each.split()[0] for each in points.operations] == ["open", "write", "flush", "rename", "flush"]
    assert points.operations[2:] == [
        f"flush {temporary}",
        f"rename {temporary} to {tmp_path / 'x'}",
        f"flush {tmp_path}",
    ]
    assert aside is None or temporary == str(tmp_path / aside)


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("before")

    def fail() -> None:
        with atomically(tmp_path / "x") as temporary:
            Path(temporary).write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_file_system_that_flushes_no_folders_is_no_error_but_others_are(tmp_path: Path, monkeypatch) -> None:
    def refuse(number: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", lambda descriptor: refuse(errno.EINVAL))
    flush(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        flush(tmp_path)
