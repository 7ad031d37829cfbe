"""Runs that die at chosen operations on files, and go on: `python -m tests.faults.crash_runs DATASET FOLDER W O`.

A tiny run of one rank dies at every W-th of its writes, and at every O-th of its other operations (flushes, renames,
removals, new folders) both as a process and with the machine; it is started again, in the same process. It must end
with the very files of the run that never died. FOLDER/summary.json gets what was done.
"""

import json
import sys
from pathlib import Path

import torch

from hmoe_ds.config_parser import load_config
from hmoe_ds.training.checkpoints.checkpoint_files import CheckpointFiles
from hmoe_ds.training.checks.preflight import check_run
from hmoe_ds.training.engine import init_distributed
from hmoe_ds.training.loop import train
from tests.distributed.harness import TIMED, arguments
from tests.faults.crash_points import CrashPoints, leave_nothing

SMALLER = {
    "run__steps": 2,
    "run__checkpoint_every": 1,
    "run__keep_checkpoints": 1,
    "data__molecules_per_step": 8,
    "data__validation_molecules": 8,
    "router__experts": 4,
    "router__groups": 2,
    "model__upper_blocks": 1,
}


def start(out: Path, dataset: str, at: int | None = None, power: bool = False) -> CrashPoints:
    """Start the run, and let it die at operation `at`, if it comes to that."""
    config = load_config(arguments(out, dataset, **SMALLER))
    with CrashPoints(out, at, power) as points:
        check_run(config, 1)
        train(config, 0, 1)
    return points


def contents(out: Path) -> dict:
    """What a run left: bytes of files; of checkpoint files of the training engine, what is in them."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if path.suffix == ".pt":
            found[name] = _plain(CheckpointFiles().load(str(path)))
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in line.items() if key not in TIMED} for line in lines]
        elif path.name == "run.json":
            found[name] = json.loads(path.read_text()) | {"starts": None}  # it tells of each
        elif path.name not in ("files.json", "lock"):  # what differs from start to start
            found[name] = path.read_bytes()
    return found


def _plain(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool, bytes, type(None))) else vars(value)


def main() -> None:
    dataset, folder, every_write, every_other = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    init_distributed()
    out = folder / "run"
    operations = start(out, dataset).operations
    expected = contents(out)
    writes = [number for number, what in enumerate(operations, 1) if what.startswith("write")]
    others = [number for number, what in enumerate(operations, 1) if not what.startswith("write")]
    chosen = [(number, power) for number in others[::every_other] for power in (False, True)]
    chosen += [(number, index % 2 == 0) for index, number in enumerate(writes[::every_write])]
    deaths = 0
    for number, power in chosen:
        leave_nothing(out)
        points = start(out, dataset, number, power)
        deaths += points.dead
        again = start(out, dataset)
        assert not again.dead
        found = contents(out)
        where = f"died at {number} ({operations[number - 1]}), power {power}"
        assert found.keys() == expected.keys(), f"{where}: {found.keys() ^ expected.keys()}"
        differing = [name for name in expected if found[name] != expected[name]]
        assert not differing, f"{where}: {differing}"
    kinds = {what.split()[0] for what in operations}
    summary = {"operations": len(operations), "kinds": sorted(kinds), "starts": len(chosen), "deaths": deaths}
    (folder / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
