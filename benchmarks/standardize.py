"""What standardisation costs `hmoe prepare`: encoding rows with and without it, in turns, in one process.

    python -m benchmarks.standardize zinc.smi.gz chembl.tsv.gz

Prints one JSON line and writes it to docs/results/standardize.json. Times are CPU time of this thread.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.result import write_result
from data_pipeline.molecules.encode import encode_rows
from data_pipeline.molecules.scaffold_fast import clear_scaffold_memos
from data_pipeline.sources.source import SourceChunk, read_chunks, resolve_sources

CHUNK_ROWS = 1000
# By how much longer encoding may take.
TARGET = 1.25


def seconds(chunk: SourceChunk, standardize: bool) -> tuple[float, int]:
    """CPU seconds to encode a chunk, and how many molecules standardisation changed."""
    clear_scaffold_memos()  # or the second turn would find what the first has computed
    before = time.thread_time()
    encoded = encode_rows(chunk.texts, chunk.ids, standardize=standardize)
    return time.thread_time() - before, encoded.standardized


def measure(path: str, rows: int) -> dict[str, float]:
    """One source: microseconds per row without and with, their ratio, and the share of rows that change."""
    (source,) = resolve_sources([path])
    totals, count, changed = {False: 0.0, True: 0.0}, 0, 0
    for number, chunk in enumerate(islice(read_chunks(source, chunk_rows=CHUNK_ROWS), -(-rows // CHUNK_ROWS))):
        for standardize in (False, True) if number % 2 else (True, False):
            spent, standardized = seconds(chunk, standardize)
            totals[standardize] += spent
            changed += standardized
        count += len(chunk.texts)
    return {
        "rows": count,
        "us_per_row_without": 1e6 * totals[False] / count,
        "us_per_row_with": 1e6 * totals[True] / count,
        "ratio": totals[True] / totals[False],
        "changed": changed / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="molecule files")
    parser.add_argument("--rows", type=int, default=20_000, help="rows of each source")
    options = parser.parse_args()
    figures = {Path(path).name: measure(path, options.rows) for path in options.sources}
    worst = max(figure["ratio"] for figure in figures.values())
    result: dict[str, Any] = {"name": "standardize", "ratio": worst, "target": TARGET, "sources": figures}
    write_result(result)


if __name__ == "__main__":
    main()
