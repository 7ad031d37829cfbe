"""`hmoe embed`: embeddings of millions of molecules from an exported model, in a Parquet file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.molecules.encode import EncodedRows
from data_pipeline.schema import REJECT_SCHEMA, storable
from data_pipeline.sources.source import SourceChunk
from data_pipeline.stages.parquet import ParquetSink
from hmoe_ds.config import Readout
from hmoe_ds.downstream.chunked import ChunkTask, Done, Report, RowOptions, done_by_chunks
from hmoe_ds.downstream.inference import Inferred, infer
from hmoe_ds.downstream.out_files import check_format
from hmoe_ds.downstream.worker_model import WorkerModel
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.size import readout_width


@dataclass(frozen=True)
class EmbedOptions:
    """What to write of each molecule.

    Args:
        standardize: embed the standard form of each molecule; None: as the model was trained.
        per_atom: embeddings of atoms instead of molecules.
        routing: also how each molecule was routed, and how far it is from what the model knows.
        readout: what the embedding of a molecule has of its atom states.
    """

    standardize: bool | None = None
    per_atom: bool = False
    routing: bool = False
    readout: Readout = "mean"

    def width(self, hidden_size: int) -> int:
        """Numbers of one embedding."""
        return hidden_size if self.per_atom else readout_width(self.readout, hidden_size)


def embed_source(
    model: str | Path,
    source: str,
    out: str | Path,
    rows: RowOptions = RowOptions(),  # noqa: B008 - frozen
    options: EmbedOptions = EmbedOptions(),
    workers: int = 1,
    report: Report = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Write one row per readable molecule, in the order of the source (`embedding_schema`).

    Rows that are no molecules go to a second file beside `out`, with the reason.

    Args:
        model: folder made by `hmoe export`, or `owner/name` on the hub.
        source: what `hmoe prepare` reads.
        out: Parquet file to write; until it is there, what is done lies in a folder beside it.
        rows: how rows of the source become molecules.
        options: what to write.
        workers: processes, one core each; with a GPU they share it.
        report: called with (stage, units done, all units).

    Returns:
        Counts of molecules and rejects, the embedding's dimensions, the files written.

    Raises:
        ModelFormatError: no exported model at `model`.
        UsageError, PipelineError: as `done_by_chunks`; there is no such readout; the name of `out` is that of another
            format; no row of the source is a molecule.
    """
    out = Path(out)
    check_format(out, "parquet")
    shared = WorkerModel.of(model)
    dimensions = options.width(shared.hidden_size)
    rejects = out.with_name(out.stem + ".rejects.parquet")

    def make_task(work: str, read_key: str, name: str, chunk: int, first_row: int) -> EmbedTask:
        return EmbedTask(work, read_key, name, chunk, first_row, rows, shared, options)

    with done_by_chunks(source, [out, rejects], shared.files.folder, rows, workers, "embed", make_task, report) as done:
        _write(done, rejects, REJECT_SCHEMA, done.rejects())
        if done.molecules:
            _write(done, out, embedding_schema(shared, options), done.results())
    done.check(source, rejects)
    return {
        "molecules": done.molecules,
        "rejected": done.rejected,
        "reasons": done.reasons,
        "dimensions": dimensions,
        "out": str(out),
        "rejects": str(rejects),
    }


def embedding_schema(model: WorkerModel, options: EmbedOptions) -> pa.Schema:
    """The columns of the file. `row` counts the rows of `source` from 0; `smiles` is canonical.

    Atom i of `atom_embeddings` is the i-th atom written in `smiles`.
    """
    vector = pa.list_(pa.float32(), options.width(model.hidden_size))
    fields = [("source", pa.string()), ("row", pa.int64()), ("source_id", pa.string()), ("smiles", pa.string())]
    fields += [("atom_embeddings", pa.list_(vector))] if options.per_atom else [("embedding", vector)]
    if options.routing:
        fields += [("group", pa.int32()), ("experts", pa.list_(pa.int32(), model.layers)), ("novelty", pa.float32())]
    return pa.schema(fields)


def embed_batch(model: HMoEModel, molecules: pa.RecordBatch, device: str) -> NDArray[np.float32]:
    """Embeddings of encoded molecules, [rows, D]; they do not depend on what else is in the batch, but for rounding."""
    return infer(model, molecules, device).embedding_XW


@dataclass(frozen=True)
class EmbedTask(ChunkTask):
    """Embed the molecules of a chunk."""

    model: WorkerModel
    what: EmbedOptions

    @property
    def settings(self) -> tuple[object, ...]:
        return (self.model.files.identity, self.standardize, self.what.per_atom, self.what.routing, self.what.readout)

    @property
    def standardize(self) -> bool:
        return self.model.standardize if self.what.standardize is None else self.what.standardize

    @property
    def schema(self) -> pa.Schema:
        return embedding_schema(self.model, self.what)

    def results(self, chunk: SourceChunk, encoded: EncodedRows) -> pa.RecordBatch:
        model, device = self.model.loaded()
        inferred = infer(model, encoded.batch, device, self.what.per_atom, self.what.routing, self.what.readout)
        source = pa.array([storable(self.name)] * len(encoded.kept), pa.string())
        return _to_batch(source, chunk.first_row + encoded.kept, encoded.batch, inferred, self.schema)


def _to_batch(
    source: pa.Array, row_n: NDArray[np.int64], molecules: pa.RecordBatch, inferred: Inferred, schema: pa.Schema
) -> pa.RecordBatch:
    width = inferred.embedding_XW.shape[1]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(inferred.embedding_XW.reshape(-1)), width)
    if "atom_embeddings" in schema.names:
        end_n = np.cumsum(molecules.column("num_atoms").to_numpy(), dtype=np.int32)
        vectors = pa.ListArray.from_arrays(pa.array(np.concatenate([np.zeros(1, np.int32), end_n])), vectors)
    columns = [source, pa.array(row_n), molecules.column("source_id"), molecules.column("smiles"), vectors]
    if inferred.routing is not None:
        group_n, experts_nL, novelty_n = inferred.routing
        experts = pa.FixedSizeListArray.from_arrays(pa.array(experts_nL.reshape(-1)), experts_nL.shape[1])
        columns += [pa.array(group_n), experts, pa.array(novelty_n, mask=np.isnan(novelty_n))]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _write(done: Done, out: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """One Parquet file of what the tasks have written, which is there as a whole or not at all."""
    with done.write(out) as temporary, ParquetSink(Path(temporary), schema) as sink:
        for batch in batches:
            sink.append(batch)
