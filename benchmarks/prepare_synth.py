"""A library of synthetic molecules prepared from end to end: rate, peak memory, size, and what that means for ZINC.

    python -m benchmarks.prepare_synth --molecules 2000000 --workers 2

Prints one JSON line and writes it to docs/results/prepare_synth.json. Memory is the largest proportional set size
(shared pages divided by their users) of any worker process and of the main process, sampled twice a second.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.result import write_result
from data_pipeline.build import prepare
from data_pipeline.execution.executor import DEFAULT_MEMORY, Resources
from data_pipeline.options import PrepareOptions

LIBRARIES = {"ZINC20": 1.4e9, "PubChem": 1.2e8}


class PeakMemory:
    """Samples this process and its children in a thread of its own, until the `with` statement ends."""

    def __init__(self) -> None:
        self.main = 0
        self.worker = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._over.wait(0.5):
            self.main = max(self.main, process.memory_full_info().pss)
            for child in process.children(recursive=True):
                try:
                    self.worker = max(self.worker, child.memory_full_info().pss)
                except psutil.NoSuchProcess:
                    continue


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecules", type=int, default=2_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-standardize", dest="standardize", action="store_false")
    parser.add_argument("--out", help="where to write the dataset (default: a temporary folder)")
    options = parser.parse_args()
    stages: dict[str, float] = {}
    started = time.perf_counter()

    def report(stage: str, done: int, total: int) -> None:
        stages[stage] = time.perf_counter() - started

    with tempfile.TemporaryDirectory() as scratch, PeakMemory() as memory:
        out = Path(options.out or Path(scratch, "dataset"))
        settings = PrepareOptions(standardize=options.standardize)
        source = f"synth:{options.molecules}?seed=1"
        done = prepare([source], out, settings, Resources(options.workers), report)
        seconds = time.perf_counter() - started
        manifest = done.manifest
        size = size_of(out)
    written = sum(manifest.counts.written.values())
    rate = written / seconds
    core_seconds = options.workers * seconds / written
    result: dict[str, Any] = {
        "name": "prepare_synth",
        "molecules": written,
        "counts": manifest.counts.__dict__,
        "scaffolds": {name: split.scaffolds for name, split in manifest.splits.items()},
        "atoms_per_molecule": sum(split.atoms for split in manifest.splits.values()) / written,
        "standardize": options.standardize,
        "workers": options.workers,
        "seconds": seconds,
        "stage_ends_at_seconds": stages,
        "molecules_per_second": rate,
        "peak_memory_main_mb": memory.main / 1e6,
        "peak_memory_worker_mb": memory.worker / 1e6,
        "memory_limit_mb": DEFAULT_MEMORY / 1e6,
        "bytes_per_molecule": size / written,
        "core_hours": {name: count * core_seconds / 3600 for name, count in LIBRARIES.items()},
    }
    write_result(result)


if __name__ == "__main__":
    main()
