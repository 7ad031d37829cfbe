"""`hmoe prepare` that is killed, runs out of disk, or reads half a file: run again, it gives the same bytes."""

import contextlib
import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rdkit import RDConfig

NCI = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
FILES = 10
ROWS = 120


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Ten files with some duplicates, the last one gzipped: ten tasks to read and ten to encode."""
    folder = tmp_path_factory.mktemp("sources")
    lines = NCI.read_text().splitlines()
    for number in range(FILES):
        text = "\n".join([*lines[number * ROWS : (number + 1) * ROWS + 10], "C1CC", ""])
        path = folder / f"part{number}.smi"
        path.write_text(text)
        if number == FILES - 1:
            Path(f"{path}.gz").write_bytes(gzip.compress(text.encode()))
            path.unlink()
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope="module")
def expected(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    out = tmp_path_factory.mktemp("expected") / "out"
    assert start(sources, out).wait() == 0
    return contents(out)


def start(sources: list[str], out: Path, *arguments: str, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "hmoe_ds.cli", "prepare", *sources, "--out", str(out), "--workers", "1"]
    command += ["--shard-rows", "300", "--validation-fraction", "0.1", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[2], **options
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def records(out: Path) -> int:
    """Tasks that are done."""
    return len(list((out / ".hmoe_prepare").glob("record-*")))


def mapped_files(out: Path) -> dict[str, int]:
    """The files of encoded molecules, and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (out / ".hmoe_prepare").glob("mapped-*[0-9a-f]")}


def wait_until(reached: Callable[[], bool], process: subprocess.Popen) -> None:
    while not reached() and process.poll() is None:
        time.sleep(0.002)


@pytest.mark.timeout(300)
def test_killed_again_and_again(sources: list[str], expected: dict[str, bytes], tmp_path: Path) -> None:
    """At ever later moments; each run goes on where the one before was killed."""
    out = tmp_path / "out"
    chosen = random.Random(0)
    goals = range(2, 2 * FILES + 3, 4)
    for goal in goals:
        process = start(sources, out)
        wait_until(lambda goal=goal: records(out) >= goal, process)
        time.sleep(chosen.uniform(0, 0.03))
        process.kill()
        process.communicate()
        assert records(out) >= goal
        assert not (out / "manifest.json").exists()
    assert "taken over from an interrupted run" in finish(start(sources, out))
    assert contents(out) == expected


@pytest.mark.timeout(300)
@pytest.mark.parametrize("moment", ["publication-*", "removed-*", "manifest"])
def test_killed_while_the_dataset_is_moved(
    moment: str, sources: list[str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(sources, out)
    if moment == "manifest":
        wait_until((out / "manifest.json").exists, process)
    else:
        wait_until(lambda: any((out / ".hmoe_prepare").glob(moment)), process)
    process.kill()
    process.communicate()
    finish(start(sources, out))
    assert contents(out) == expected


@pytest.mark.timeout(120)
def test_killed_worker_processes(sources: list[str], expected: dict[str, bytes], tmp_path: Path) -> None:
    """The run itself goes on."""
    out = tmp_path / "out"
    process = start(sources, out)
    for goal in (2, 12, 15):
        wait_until(lambda goal=goal: records(out) >= goal, process)
        for child in psutil.Process(process.pid).children():
            child.send_signal(signal.SIGKILL)
    assert "a worker process ended" in finish(process)
    assert contents(out) == expected


@pytest.mark.timeout(120)
def test_only_the_unfinished_is_done_again(sources: list[str], expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(sources, out)
    wait_until(lambda: records(out) >= FILES + 6, process)
    process.kill()
    process.communicate()
    before = mapped_files(out)
    assert len(before) >= 5
    again = start(sources, out)
    kept: dict[str, int] = {}
    while again.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            kept |= mapped_files(out)
        time.sleep(0.01)
    finish(again)
    assert before.items() <= kept.items()
    assert contents(out) == expected


@pytest.mark.timeout(120)
def test_truncated_file_that_is_fetched_again(sources: list[str], expected: dict[str, bytes], tmp_path: Path) -> None:
    for source in sources:
        shutil.copy(source, tmp_path)
    copies = [str(tmp_path / Path(source).name) for source in sources]
    whole = Path(copies[-1]).read_bytes()
    Path(copies[-1]).write_bytes(whole[:-200])
    process = start(copies, tmp_path / "out")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "part9.smi.gz" in output
    assert "fetch it again" in output
    assert "Traceback" not in output
    assert not (tmp_path / "out" / "manifest.json").exists()
    Path(copies[-1]).write_bytes(whole)
    finish(start(copies, tmp_path / "out"))
    assert contents(tmp_path / "out") == expected


@pytest.mark.timeout(120)
def test_disk_full(sources: list[str], expected: dict[str, bytes], tmp_path: Path) -> None:
    """A file system of 1 MB in a namespace of its own, then again with room."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(mount)], capture_output=True).returncode:
        pytest.skip("mounting in a namespace of one's own is not allowed here")
    command = [sys.executable, "-m", "hmoe_ds.cli", "prepare", *sources, "--out", f"{mount}/out", "--workers", "1"]
    command += ["--shard-rows", "300", "--validation-fraction", "0.1"]
    script = f"""
        mount -t tmpfs -o size=700k none {mount}
        "$@" && exit 3
        mount -o remount,size=100m {mount}
        "$@" && cp -r {mount}/out {tmp_path}/copy
    """
    run = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, "-", *command],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=110,
    )
    assert run.returncode == 0, run.stderr
    assert "No space left on device; mend it and run again: what is done is kept" in run.stderr
    assert "Traceback" not in run.stderr
    assert "taken over from an interrupted run" in run.stdout
    assert contents(tmp_path / "copy") == expected


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@pytest.mark.timeout(120)
def test_a_file_that_cannot_be_written(sources: list[str], expected: dict[str, bytes], tmp_path: Path) -> None:
    """As a full disk, where namespaces are not allowed."""
    process = start(sources, tmp_path / "out", preexec_fn=limit_file_size)
    output, _ = process.communicate(timeout=110)
    assert process.returncode == 1
    assert "File too large" in output
    assert "Traceback" not in output
    finish(start(sources, tmp_path / "out"))
    assert contents(tmp_path / "out") == expected


def test_two_at_once(sources: list[str], expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(sources, out)
    wait_until(lambda: records(out) >= 2, first)
    second = start(sources, out)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    assert "another command is at work there" in output
    finish(first)
    assert contents(out) == expected


@pytest.mark.timeout(120)
def test_other_options_are_not_mixed_with_an_interrupted_run(sources: list[str], tmp_path: Path) -> None:
    interrupted, clean = tmp_path / "interrupted", tmp_path / "clean"
    process = start(sources, interrupted)
    wait_until(lambda: records(interrupted) >= FILES + 6, process)
    process.kill()
    process.communicate()
    for out in (interrupted, clean):
        finish(start(sources, out, "--max-atoms", "25"))
    assert contents(interrupted) == contents(clean)
    assert not (interrupted / ".hmoe_prepare").exists()


@pytest.mark.timeout(200)
def test_dask_workers_by_address_one_of_them_killed(
    sources: list[str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    """A scheduler and two workers as on a cluster; what the killed one had in hand is done by the other."""
    out = tmp_path / "out"
    python = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    address_file = tmp_path / "scheduler.json"
    environment = {**os.environ, "DASK_LOGGING__DISTRIBUTED": "critical"}
    processes: list[subprocess.Popen] = []

    def launch(*command: str) -> subprocess.Popen:
        options = {"cwd": Path(__file__).parents[2], "env": environment, "stderr": subprocess.DEVNULL}
        processes.append(subprocess.Popen(command, **options))
        return processes[-1]

    try:
        where = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(address_file)]
        scheduler = launch(*python, *where)
        wait_until(address_file.exists, scheduler)
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(address_file)]
        settings = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path / "scratch")]
        workers = [launch(*worker, *settings, "--host", "127.0.0.1") for _ in range(2)]
        address = json.loads(address_file.read_text())["address"]
        run = start(sources, out, "--scheduler", address)
        wait_until(lambda: records(out) >= FILES + 2, run)
        workers[0].kill()
        output = finish(run)
        assert f", {address}" in output
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()
    assert contents(out) == expected
