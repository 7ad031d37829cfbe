"""`hmoe predict`: what a fine-tuned predictor says of the molecules of a source, in a CSV file with a line per row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import torch

from data_pipeline.molecules.encode import EncodedRows
from data_pipeline.schema import storable
from data_pipeline.sources.source import SourceChunk
from hmoe_ds.downstream.chunked import ChunkTask, Done, Report, RowOptions, done_by_chunks
from hmoe_ds.downstream.inference import inference_device
from hmoe_ds.downstream.labelled_table import shown_structures
from hmoe_ds.downstream.out_files import check_format
from hmoe_ds.downstream.predictor import Predictor, load_predictor
from hmoe_ds.downstream.predictor_record import read_predictor
from hmoe_ds.downstream.worker_files import WorkerFiles


def predict_source(
    predictor: str | Path,
    source: str,
    out: str | Path,
    rows: RowOptions = RowOptions(),  # noqa: B008 - frozen
    workers: int = 1,
    report: Report = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Write one line per row of the source, in its order.

    Columns: `source` and `row`, from 0, `source_id`, `smiles` as it was read, or that of a mol block, then for each
    target its prediction (the chance of class 1, or the quantity) and, behind it, `TARGET_deviation`, its standard
    deviation over the ensemble, empty where that has one member; and `reason`, for a row that is no molecule and so has
    none.

    Args:
        predictor: folder made by `hmoe finetune`.
        source: what `hmoe prepare` reads.
        out: CSV file to write; until it is there, what is done lies in a folder beside it.
        rows: how rows of the source become molecules.
        workers: processes, one core each; with a GPU they share it.
        report: called with (stage, units done, all units).

    Returns:
        Counts of molecules and rejects, the file written.

    Raises:
        PredictorError: no predictor at `predictor`.
        UsageError, PipelineError: as `done_by_chunks`; the name of `out` is that of another format; no row of the
            source is a molecule.
    """
    out = Path(out)
    check_format(out, "csv")
    shared = WorkerPredictor.of(predictor)

    def make_task(work: str, read_key: str, name: str, chunk: int, first_row: int) -> PredictTask:
        return PredictTask(work, read_key, name, chunk, first_row, rows, shared)

    with done_by_chunks(source, [out], shared.files.folder, rows, workers, "predict", make_task, report) as done:
        _write(done, out, _schema(shared.targets))
    done.check(source, out)
    return {
        "molecules": done.molecules,
        "rejected": done.rejected,
        "reasons": done.reasons,
        "targets": list(shared.targets),
        "out": str(out),
    }


@dataclass(frozen=True)
class WorkerPredictor:
    """Where a predictor lies, and what it is.

    Args:
        files: of the predictor.
        targets: names of what it predicts.
        standardize: whether it was fitted to molecules in their standard form.
    """

    files: WorkerFiles
    targets: tuple[str, ...]
    standardize: bool

    @classmethod
    def of(cls, folder: str | Path) -> WorkerPredictor:
        """The predictor in `folder`. Raises PredictorError when there is none."""
        folder = Path(folder).absolute()
        content = read_predictor(folder)
        found = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors"))
        files = WorkerFiles.of(folder, (str(path.relative_to(folder)) for path in found))
        return cls(files, tuple(content["targets"]), content["standardize"])

    def loaded(self) -> Predictor:
        """The predictor in this process. A worker is one core.

        Raises:
            PipelineError: its files have changed since they were looked at.
        """
        torch.set_num_threads(1)
        predictor = _load(self.files.folder, self.files.identity)
        self.files.check()
        return predictor


@cache
def _load(folder: str, identity: str) -> Predictor:
    return load_predictor(folder).to(inference_device())


@dataclass(frozen=True)
class PredictTask(ChunkTask):
    """Predict the properties of the molecules of a chunk."""

    predictor: WorkerPredictor

    @property
    def settings(self) -> tuple[object, ...]:
        return (self.predictor.files.identity,)

    @property
    def standardize(self) -> bool:
        return self.predictor.standardize

    @property
    def schema(self) -> pa.Schema:
        return _schema(self.predictor.targets)

    def results(self, chunk: SourceChunk, encoded: EncodedRows) -> pa.RecordBatch:
        prediction = self.predictor.loaded().predict(encoded.batch)
        rows = len(chunk.texts)
        reasons: list[str | None] = [None] * rows
        for reject in encoded.rejects:
            reasons[reject.index] = reject.reason
        columns = [
            pa.array([storable(self.name)] * rows),
            pa.array(range(chunk.first_row, chunk.first_row + rows), pa.int64()),
            pa.array([storable(text) for text in chunk.ids]),
            pa.array([storable(text) for text in shown_structures(chunk.texts, encoded.kept, encoded.batch)]),
        ]
        for target in range(len(self.predictor.targets)):
            columns += [_spread(values[:, target], encoded.kept, rows) for values in prediction]
        return pa.RecordBatch.from_arrays([*columns, pa.array(reasons, pa.string())], schema=self.schema)


def _schema(targets: Iterable[str]) -> pa.Schema:
    numbers = [(name, pa.float64()) for target in targets for name in (target, f"{target}_deviation")]
    texts = [("source_id", pa.string()), ("smiles", pa.string())]
    return pa.schema([("source", pa.string()), ("row", pa.int64()), *texts, *numbers, ("reason", pa.string())])


def _spread(values: np.ndarray, places: np.ndarray, rows: int) -> pa.Array:
    """Values of some rows as a column of all of them, null elsewhere and for NaN."""
    column, missing = np.zeros(rows), np.ones(rows, bool)
    column[places], missing[places] = values, np.isnan(values)
    return pa.array(column, mask=missing)


def _write(done: Done, out: Path, schema: pa.Schema) -> None:
    """One CSV file of what the tasks have written, which is there as a whole or not at all."""
    with done.write(out) as temporary, pyarrow.csv.CSVWriter(temporary, schema) as writer:
        for batch in done.results():
            writer.write_batch(batch)
