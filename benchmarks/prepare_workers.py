"""How `hmoe prepare` scales from one worker to two: whole builds of real molecules, in turns, in one process.

    python -m benchmarks.prepare_workers zinc.smi.gz chembl.tsv.gz

Prints one JSON line and writes it to docs/results/prepare_workers.json. Times are wall-clock; nothing else must be at
work on the machine. `map` is the stage that encodes molecules; the whole has the start of the workers in it, too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.result import write_result
from data_pipeline.build import prepare
from data_pipeline.execution.executor import Resources
from data_pipeline.sources.source import read_chunks, resolve_sources

# Twice as many workers may take this much more of the processor, in sum.
TARGET = 1.8


def sample(paths: list[str], rows: int, out: Path) -> int:
    """Write the first `rows` rows of each source into one file, so that it has many chunks. Returns the rows."""
    texts = [
        text
        for source in resolve_sources(paths)
        for text in islice((text for chunk in read_chunks(source) for text in chunk.texts), rows)
    ]
    out.write_text("\n".join(texts) + "\n")
    return len(texts)


def build(source: Path, folder: Path, workers: int) -> dict[str, float]:
    """Seconds of a whole build, and of its map stage."""
    reached: dict[str, float] = {}
    started = time.perf_counter()

    def report(stage: str, done: int, total: int) -> None:
        reached[stage] = time.perf_counter()

    prepare([str(source)], folder, resources=Resources(workers), report=report)
    return {"whole": time.perf_counter() - started, "map": reached["map"] - reached["read"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="molecule files")
    parser.add_argument("--rows", type=int, default=40_000, help="rows of each source")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    seconds: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "molecules.smi")
        rows = sample(options.sources, options.rows, source)
        for number in range(options.rounds):
            for workers in (1, 2) if number % 2 == 0 else (2, 1):
                seconds[workers].append(build(source, Path(scratch, f"{number}-{workers}"), workers))
    taken = {
        part: {workers: median(run[part] for run in runs) for workers, runs in seconds.items()}
        for part in ("whole", "map")
    }
    result: dict[str, Any] = {
        "name": "prepare_workers",
        "ratio": taken["map"][1] / taken["map"][2],
        "target": TARGET,
        "ratio_whole": taken["whole"][1] / taken["whole"][2],
        "rows": rows,
        "seconds": taken,
        "rows_per_second": {workers: rows / whole for workers, whole in taken["whole"].items()},
    }
    write_result(result)


if __name__ == "__main__":
    main()
