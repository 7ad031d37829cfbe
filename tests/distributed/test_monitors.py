"""What DeepSpeed's monitors have of a real run, and of one that is set back and resumed: what `metrics.jsonl` has."""

import csv
import json
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.harness import read_metrics, train


def figures(out):
    """-> by name, (step, value) of the numbers in `metrics.jsonl`"""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(out):
        for name, value in line.items():
            if name not in ("step", "time") and value is not None:
                found.setdefault(name, []).append((line["step"], value))
    return found


def in_csv(folder):
    found = {}
    for path in set(folder.glob("*.csv")) - {folder / "notes.csv"}:
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["step", path.stem]
        found[path.stem] = [(int(step), float(value)) for step, value in rows]
    return found


def in_tensorboard(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def in_single_precision(points):
    return {name: [(step, pytest.approx(value, rel=1e-6)) for step, value in each] for name, each in points.items()}


def test_tensorboard_and_csv_have_each_figure_of_each_line_once_also_after_a_resume(dataset, tmp_path):
    on = {"zero_optimization": {"stage": 1}, "tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True}}
    (tmp_path / "ds.json").write_text(json.dumps(on))
    out = tmp_path / "run"
    settings = {"parallel__deepspeed_config": tmp_path / "ds.json", "run__checkpoint_every": 2, "run__steps": 5}

    def check(steps):
        expected = figures(out)
        assert [step for step, _ in expected["loss"]] == steps
        assert "validation_loss" in expected
        assert in_csv(out / "csv_monitor") == expected
        assert in_tensorboard(out / "tensorboard") == in_single_precision(expected)

    train(out, dataset, **settings)
    check([1, 2, 3, 4, 5])
    # As if it had been killed before the last checkpoints: steps 3 to 5 are done again.
    for step in (4, 5):
        shutil.rmtree(out / "checkpoints" / f"step{step:08d}")
    (out / "checkpoints" / "latest").write_text("step00000002")
    first = figures(out)["molecules_per_second"]
    (out / "csv_monitor" / "notes.csv").write_text("step,remark\n9,not of a monitor\n")
    train(out, dataset, **(settings | {"run__validate_every": 3}))
    check([1, 2, 3, 4, 5])
    # What is there of them is of the second time, with figures that tell the time and a validation that was not there.
    assert figures(out)["molecules_per_second"][:2] == first[:2]
    assert figures(out)["molecules_per_second"][2:] != first[2:]
    assert [step for step, _ in figures(out)["validation_loss"]] == [3, 5]
    assert (out / "csv_monitor" / "notes.csv").read_text() == "step,remark\n9,not of a monitor\n"
