"""Who does the tasks: results in order, tasks drawn as needed, errors come through, done tasks are not done again."""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import LocalCluster

import data_pipeline
from data_pipeline.errors import UsageError
from data_pipeline.execution import executor as module
from data_pipeline.execution.executor import Resources, open_executor
from tests.unit.data_pipeline.small_tasks import Square


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_tasks_are_drawn_as_needed(workers: int, tmp_path: Path) -> None:
    drawn: list[int] = []

    def tasks() -> Iterator[Square]:
        for number in range(40):
            drawn.append(number)
            yield Square(str(tmp_path), number)

    with open_executor(Resources(workers), str(tmp_path)) as executor:
        for done, result in enumerate(executor.run(tasks())):
            assert result == done * done
            assert len(drawn) <= done + 1 + 3 * workers
        assert (executor.tasks, executor.resumed) == (40, 0)
    assert drawn == list(range(40))


@pytest.mark.parametrize("workers", [1, 2])
def test_error_of_a_task_comes_through_and_says_where(workers: int, tmp_path: Path) -> None:
    tasks = [Square(str(tmp_path), number) for number in (1, -1, 2)]
    with (
        open_executor(Resources(workers), str(tmp_path)) as executor,
        pytest.raises(RuntimeError, match=r"small_tasks\.py(.|\n)*-1 is negative"),
    ):
        list(executor.run(tasks))


def test_done_tasks_are_not_done_again(tmp_path: Path) -> None:
    def run(*numbers: int) -> tuple[list[int], int, list[str]]:
        (tmp_path / "log").write_text("")
        with open_executor(Resources(), str(tmp_path)) as executor:
            results = list(executor.run(Square(str(tmp_path), number) for number in numbers))
        return results, executor.resumed, (tmp_path / "log").read_text().split()

    assert run(1, 2) == ([1, 4], 0, ["1", "2"])
    assert run(2, 3, 1) == ([4, 9, 1], 2, ["3"])
    # A record without its file does not count.
    (tmp_path / "square-2").unlink()
    assert run(1, 2, 3) == ([1, 4, 9], 2, ["2"])
    # Nor does one whose file a crash of the machine has shortened.
    (tmp_path / "square-3").write_text("")
    assert run(1, 2, 3) == ([1, 4, 9], 2, ["3"])


def test_tasks_done_by_other_code_are_done_again(tmp_path: Path) -> None:
    """Whichever file of the package has changed."""
    code = tmp_path / "data_pipeline"
    shutil.copytree(Path(data_pipeline.__file__).parent, code)

    def version() -> bytes:
        program = "from data_pipeline.execution.task import code_version; print(code_version())"
        return subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, stdout=subprocess.PIPE).stdout

    versions = [version()]
    for changed in ("schema.py", "molecules/standardize.py", "stages/reduce_stage.py"):
        with (code / changed).open("a") as file:
            file.write("# changed\n")
        versions.append(version())
    assert len(set(versions)) == 4


def test_wrong_resources() -> None:
    with pytest.raises(UsageError, match="workers is 0"):
        Resources(workers=0)
    with pytest.raises(UsageError, match=r"memory is 100 MiB per worker; expected at least \d+ MiB"):
        Resources(memory=100 << 20)


def test_no_scheduler_at_the_address(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"tcp://127\.0\.0\.1:9: no Dask scheduler answers.*expected an address"),
        open_executor(Resources(scheduler="tcp://127.0.0.1:9"), str(tmp_path)),
    ):
        pass


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """A Dask cluster with one worker, of which the executor is told the address."""
    settings = {"processes": False, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=1, protocol="tcp", local_directory=str(tmp_path), **settings) as cluster:
        yield cluster


def test_workers_that_join_later_are_checked(cluster: LocalCluster, tmp_path: Path, monkeypatch) -> None:
    resources = Resources(scheduler=cluster.scheduler_address)
    with open_executor(resources, str(tmp_path)) as executor:
        assert list(executor.run([Square(str(tmp_path), 3)])) == [9]
        with monkeypatch.context() as patch:
            patch.setattr(module, "code_version", lambda: "of another release")
            with pytest.raises(UsageError, match=r"worker tcp://.* has another version of hmoe_ds, RDKit"):
                list(executor.run([Square(str(tmp_path), 4)]))
        (tmp_path / "marker").unlink()
        with pytest.raises(UsageError, match=r"worker tcp://.* does not see /.*; put the output on a file system"):
            list(executor.run([Square(str(tmp_path), 5)]))


def test_waiting_for_workers_is_said(cluster: LocalCluster, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(module, "_WORKERS_LOOKED_FOR_SECONDS", 0.1)
    with open_executor(Resources(scheduler=cluster.scheduler_address), str(tmp_path)) as executor:
        cluster.scale(0)
        while cluster.scheduler.workers:
            time.sleep(0.01)

        def come_back() -> None:
            while "no workers any more; waiting" not in caplog.text:
                time.sleep(0.01)
            cluster.scale(1)

        thread = threading.Thread(target=come_back, daemon=True)
        thread.start()
        assert list(executor.run([Square(str(tmp_path), 3)])) == [9]
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_workers_that_join_later_get_work(cluster: LocalCluster, tmp_path: Path) -> None:
    drawn: list[int] = []

    def tasks() -> Iterator[Square]:
        for number in range(60):
            drawn.append(number)
            yield Square(str(tmp_path), number)

    with open_executor(Resources(scheduler=cluster.scheduler_address), str(tmp_path)) as executor:
        results = executor.run(tasks())
        assert next(results) == 0
        assert len(drawn) <= 4
        cluster.scale(3)
        cluster.wait_for_workers(3, timeout=30)
        assert next(results) == 1
        assert len(drawn) >= 9
        assert list(results) == [number**2 for number in range(2, 60)]
