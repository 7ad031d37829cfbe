"""scaffolds.parquet, written piece by piece."""

from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from data_pipeline.schema import SCAFFOLD_SCHEMA, SPLITS
from data_pipeline.stages.known import merge_scaffolds
from data_pipeline.stages.parquet import ParquetSink
from data_pipeline.stages.reduce_stage import is_held_out


class ScaffoldTable:
    """Collects scaffolds, ascending by key; one that goes on in the next piece is one. Use it in a `with` statement."""

    def __init__(self, path: Path, validation_fraction: float) -> None:
        self._sink = ParquetSink(path, SCAFFOLD_SCHEMA)
        self._fraction = validation_fraction
        self._last = pa.RecordBatch.from_pylist([], schema=SCAFFOLD_SCHEMA)
        self._rows = 0
        self._held_out = 0

    def __enter__(self) -> "ScaffoldTable":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write(self._last)
        self._sink.__exit__(kind, error, trace)

    @property
    def count_by_split(self) -> dict[str, int]:
        """Scaffolds of each split."""
        return dict(zip(SPLITS, (self._rows - self._held_out, self._held_out), strict=True))

    def append(self, scaffolds: pa.RecordBatch) -> None:
        """Add scaffolds whose keys are not below those added before.

        Raises:
            PipelineError: two scaffolds have the same key.
        """
        merged = merge_scaffolds(self._last, scaffolds)
        complete = max(merged.num_rows - 1, 0)
        self._write(merged.slice(0, complete))
        self._last = merged.slice(complete)

    def _write(self, scaffolds: pa.RecordBatch) -> None:
        self._sink.append(scaffolds)
        self._rows += scaffolds.num_rows
        keys = scaffolds.column("scaffold_key").to_numpy()
        self._held_out += int(np.count_nonzero(is_held_out(keys, self._fraction)))
