"""The shared folder of the shard cache: its bound, what it evicts, what a disk or process that fails leaves."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_pipeline.errors import PipelineError
from data_pipeline.manifest import FileRecord
from hmoe_ds.data.cache_folder import CacheFolder, Need, default_folder

ROOT = Path(__file__).parents[2]
SIZE = 1000


def record(number: int, size: int = SIZE) -> FileRecord:
    return FileRecord(f"train/{number}.arrow", size, f"{number:032x}")


def add(folder: CacheFolder, number: int, need: Need = Need.WAITED_FOR, needs=None) -> bool:
    """Publish file `number`; False if there was no room for it."""
    with folder.part(record(number), need, needs or {}) as part:
        if part is None:
            return False
        folder.write(part, bytes([number]) * SIZE)
        folder.publish(part, record(number)).close()
        return True


def held(path: Path) -> set[int]:
    return {int(file.name, 16) for file in (path / "shards").iterdir()}


@pytest.fixture
def folder(tmp_path) -> CacheFolder:
    return CacheFolder(tmp_path, 3 * SIZE)


def test_what_was_not_used_for_longest_is_evicted(folder, tmp_path):
    for number in (0, 1, 2):
        add(folder, number)
    folder.open(record(0)).close()
    add(folder, 3)
    assert held(tmp_path) == {0, 2, 3}
    assert folder.open(record(1)) is None


def test_a_download_pushes_out_only_what_is_needed_less(folder, tmp_path):
    for number in (0, 1, 2):
        add(folder, number)
    needs = {record(0).blake2b: Need.CURRENT, record(1).blake2b: Need.UPCOMING, record(2).blake2b: Need.CURRENT}
    assert not add(folder, 3, Need.UPCOMING, needs)
    assert held(tmp_path) == {0, 1, 2}
    assert add(folder, 3, Need.CURRENT, needs)
    assert held(tmp_path) == {0, 2, 3}
    assert add(folder, 4, Need.WAITED_FOR, needs)
    assert held(tmp_path) == {0, 2, 4}
    assert add(folder, 5, Need.WAITED_FOR, needs | {record(4).blake2b: Need.UPCOMING})
    assert held(tmp_path) == {0, 2, 5}
    assert add(folder, 6, Need.WAITED_FOR, needs | {record(5).blake2b: Need.CURRENT})
    assert held(tmp_path) == {2, 5, 6}


def test_downloads_under_way_count_and_are_not_evicted(folder, tmp_path):
    with (
        folder.part(record(0), Need.UPCOMING, {}) as first,
        folder.part(record(1), Need.UPCOMING, {}) as second,
        CacheFolder(tmp_path, 3 * SIZE).part(record(2), Need.UPCOMING, {}) as third,
    ):
        assert None not in (first, second, third)
        assert not add(folder, 3)
    assert add(folder, 3)
    assert held(tmp_path) == {3}


def test_a_mapping_outlives_the_eviction(folder, tmp_path):
    add(folder, 7)
    with folder.open(record(7)) as file:
        for number in (1, 2, 3):
            add(folder, number)
        assert held(tmp_path) == {1, 2, 3}
        assert file.read() == bytes([7]) * SIZE


def test_a_part_that_was_not_published_leaves_nothing(folder, tmp_path):
    with pytest.raises(ZeroDivisionError), folder.part(record(0), Need.CURRENT, {}):
        1 / 0  # noqa: B018
    assert list((tmp_path / "partial").iterdir()) == []
    assert folder.open(record(0)) is None


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_a_file_of_another_size_is_not_trusted(folder, tmp_path, size):
    (tmp_path / "shards" / record(0).blake2b).write_bytes(bytes(size))
    assert folder.open(record(0)) is None
    assert held(tmp_path) == set()


def test_only_one_thread_downloads_a_file(folder):
    inside, most = [0], [0]
    gate = threading.Barrier(4)

    def download():
        gate.wait(20)
        with folder.downloading(record(0)):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            threading.Event().wait(0.02)
            inside[0] -= 1

    threads = [threading.Thread(target=download) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (inside, most) == ([0], [1])


def test_what_a_killed_process_left_is_removed_and_its_locks_are_free(folder, tmp_path):
    code = (
        "import sys, time; from data_pipeline.manifest import FileRecord; from hmoe_ds.data.cache_folder import *\n"
        f"record = FileRecord('train/0.arrow', {SIZE}, '{record(0).blake2b}')\n"
        f"folder = CacheFolder(sys.argv[1], {3 * SIZE})\n"
        "with folder.downloading(record), folder.part(record, Need.CURRENT, {}) as part:\n"
        "    folder.write(part, b'half'); print('writing', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "writing\n"
            CacheFolder(tmp_path, 3 * SIZE)
            (part,) = (tmp_path / "partial").iterdir()  # its process lives
            assert part.stat().st_size == SIZE
        finally:
            child.send_signal(signal.SIGKILL)
    assert part.exists()
    again = CacheFolder(tmp_path, 3 * SIZE)
    assert list((tmp_path / "partial").iterdir()) == []
    assert again.open(record(0)) is None
    with again.downloading(record(0)):
        assert add(again, 0)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_shows_before_the_download(folder, tmp_path, monkeypatch, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = (
        f"^{tmp_path}: the disk of the shard cache is full; free space there, lower data.cache_gb, or set data.cache_"
    )
    with pytest.raises(PipelineError, match=message), folder.part(record(0), Need.CURRENT, {}):
        pass
    assert list((tmp_path / "partial").iterdir()) == []


def test_a_file_that_the_system_refuses_to_write(tmp_path):
    code = (
        "import resource, sys; from data_pipeline.manifest import FileRecord; from hmoe_ds.data.cache_folder import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "folder, record = CacheFolder(sys.argv[1], 10**6), FileRecord('a', 2000, '0' * 32)\n"
        "with folder.part(record, Need.CURRENT, {}): pass\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    last = result.stderr.splitlines()[-1]
    assert last.startswith("data_pipeline.errors.PipelineError: ")
    assert f"{tmp_path}: the shard cache cannot be used (File too large); set data.cache_dir to a folder on a" in last


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match=r"file: the shard cache cannot be used \(.*\); set data.cache_dir to"):
        CacheFolder(tmp_path / "file", SIZE)


def test_the_default_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "hmoe_ds" / "shards" / socket.gethostname()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_folder().parent == Path("/home/somebody/.cache/hmoe_ds/shards")
