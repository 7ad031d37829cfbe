"""A child process does the tasks: what hangs or crashes it is a row's fault, and the others are done."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline.errors import PipelineError
from data_pipeline.execution import supervise
from data_pipeline.execution.supervise import supervised
from data_pipeline.sources.source import resolve_sources
from data_pipeline.stages.map_stage import MapTask
from data_pipeline.stages.partitions import read_batch
from data_pipeline.stages.read_stage import ReadTask
from tests.unit.data_pipeline.small_tasks import Die, Modules, Rows, Say, Spin, Square


def test_a_row_that_hangs_or_crashes_is_rejected_and_the_others_are_done(tmp_path: Path) -> None:
    task = Rows(str(tmp_path), ("a", "spin", "b", "segfault", "killed 4 times", "killed 99 times", "spin", "c"))
    assert supervised(task) == ["a", "timeout", "b", "crash", "killed 4 times", "crash", "timeout", "c"]


def test_a_kill_from_outside_costs_nothing_but_time(tmp_path: Path) -> None:
    assert supervised(Die(str(tmp_path), times=2)) == 2


def test_a_process_that_dies_without_a_row_to_blame_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"ended 3 times \(SIGKILL: killed from outside, or for memory\).*fewer"):
        supervised(Die(str(tmp_path), times=100))
    # The next task is not affected.
    assert supervised(Square(str(tmp_path), 3)) == 9


def test_what_lies_in_the_current_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "queue.py").write_text("raise RuntimeError('the wrong queue')")
    (tmp_path / "data_pipeline").mkdir()
    (tmp_path / "data_pipeline" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervise, "_idle", [])
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "a:b")])
    assert supervised(Modules(str(tmp_path))) == sys.path


def test_what_a_process_says_that_ends_by_itself_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert supervised(Say(str(tmp_path), "a warning", 0)) == 0
    assert capsys.readouterr().err == "a warning\n"
    with pytest.raises(
        PipelineError, match=r"3 times by itself.*exit code 3.*said last: no such module; mend"
    ) as error:
        supervised(Say(str(tmp_path), "no such module", 3))
    assert "--workers" not in str(error.value)
    assert "no such module\n" in capsys.readouterr().err


def test_kills_at_ever_different_rows_end_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_KILLS_OF_A_TASK", 6)
    # A row that is killed by itself is rejected, and the count begins anew; what is no kill does not count.
    rows = ("spin", "killed 99 times", "killed 3 times", "segfault", "killed 2 times")
    assert supervised(Rows(str(tmp_path), rows)) == ["timeout", "crash", *rows[2:3], "crash", rows[4]]
    once = tuple(f"killed 1 time {number}" for number in range(8))
    with pytest.raises(PipelineError, match=r"ended 6 times \(SIGKILL: killed .*, or for memory\); run again"):
        supervised(Rows(str(tmp_path), once))


@pytest.mark.timeout(60)
def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Though it is in the midst of a task that never ends."""
    imports = f"from data_pipeline.execution.supervise import supervised; from {Spin.__module__} import Spin"
    program = f"{imports}; supervised(Spin({str(tmp_path)!r}))"
    parent = subprocess.Popen([sys.executable, "-c", program])
    pid_file = tmp_path / "pid"
    while not (pid_file.exists() and pid_file.read_text()):
        time.sleep(0.05)
    child = int(pid_file.read_text())
    assert psutil.pid_exists(child)
    parent.kill()
    parent.wait()
    while psutil.pid_exists(child):
        time.sleep(0.05)


def test_a_molecule_that_takes_too_long_is_a_reject(tmp_path: Path) -> None:
    """Sanitising, ranking and decomposing thousands of atoms takes seconds; the molecules around it are kept."""
    slow = "C1" + "C" * 9000 + "C1"
    (tmp_path / "a.smi").write_text(f"CCO one\n{slow} two\nCCN three\n")
    (source,) = resolve_sources([str(tmp_path / "a.smi")])
    read = ReadTask(str(tmp_path), source, None, None, 100)
    assert supervised(read) == [3]
    task = MapTask(str(tmp_path), read.key, "a.smi", 0, 0, 1, max_atoms=10_000, standardize=False, molecule_seconds=1)
    result = supervised(task)
    assert (result.rows, dict(result.rejected)) == (3, {"timeout": 1})
    assert read_batch(task.mapped_file, 0).column("source_id").to_pylist() == ["one", "three"]
    (reject,) = read_batch(task.rejects_file, 0).to_pylist()
    assert (reject["row"], reject["reason"]) == (1, "timeout")
