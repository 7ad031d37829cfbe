"""Three sets of molecules with no scaffold in two of them: one to train on, one to tune on, one to report on.

Scaffolds are told apart by the range of their keys, as `hmoe prepare` does it: the topmost twentieth is reported on,
the twentieth below it is tuned on. The molecules of the labelled tables are in none of the sets.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

_HELD_OUT = 0.05


class Datasets(NamedTuple):
    """`main`: its training split is trained on, its validation split tuned on. `report`: its validation split only."""

    main: Path
    report: Path


def make_datasets(sources: Sequence[str], labelled: Sequence[str], out: Path, workers: int) -> Datasets:
    """Prepare both datasets in `out`; what is there already is kept."""
    made = Datasets(out / "main", out / "report")
    _prepare(sources, labelled, made.report, _HELD_OUT, workers)
    reported = out / "report.smi"
    if not reported.exists():
        reported.write_text("".join(smiles + "\n" for smiles in _smiles(made.report / "validation")))
    _prepare(sources, [*labelled, str(reported)], made.main, 2 * _HELD_OUT, workers)
    return made


def _prepare(sources: Sequence[str], exclude: Sequence[str], out: Path, held_out: float, workers: int) -> None:
    command = [sys.executable, "-m", "hmoe_ds.cli", "prepare", *sources, "--out", str(out)]
    command += ["--validation-fraction", str(held_out), "--workers", str(workers), "--exclude", *exclude]
    subprocess.run(command, check=True)


def _smiles(folder: Path) -> list[str]:
    return [
        smiles
        for shard in sorted(folder.glob("*.arrow"))
        for smiles in pa.ipc.open_stream(shard).read_all().column("smiles").to_pylist()
    ]
