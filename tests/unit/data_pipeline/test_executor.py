"""Who does the tasks: results in order, tasks drawn as needed, errors come through, done tasks are not done again."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import UsageError
from data_pipeline.executor import Resources, open_executor
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
