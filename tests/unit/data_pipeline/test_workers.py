"""The pool: results in order, tasks drawn as needed, errors come through."""

from collections.abc import Iterator

import pytest

from data_pipeline.workers import Workers


def square(number: int) -> int:
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number * number


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order_and_tasks_are_drawn_as_needed(count: int) -> None:
    drawn: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(50):
            drawn.append(number)
            yield number

    with Workers(count) as pool:
        for done, result in enumerate(pool.run(square, tasks())):
            assert result == done * done
            assert len(drawn) <= done + 1 + 2 * count
    assert drawn == list(range(50))


@pytest.mark.parametrize("count", [1, 2])
def test_error_of_a_task_comes_through(count: int) -> None:
    with pytest.raises(ValueError, match="-1 is negative"), Workers(count) as pool:
        list(pool.run(square, [1, -1, 2]))
