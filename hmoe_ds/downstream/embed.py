"""Embeddings of molecules from an exported model, streamed into a Parquet file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from data_pipeline.encode import encode_rows, reject_batch
from data_pipeline.errors import PipelineError
from data_pipeline.schema import REJECT_SCHEMA
from data_pipeline.sources import check_columns, read_chunks, resolve_sources
from hmoe_ds.data.batch import gather
from hmoe_ds.data.store import BatchStore
from hmoe_ds.model.hmoe import HMoEModel

CHUNK_ROWS = 2048
MOLECULES_PER_BATCH = 256

Report = Callable[[str, int, int | None], None]


def embed_source(
    model_path: str | Path,
    source: str,
    out: str | Path,
    smiles_column: str | None = None,
    id_column: str | None = None,
    standardize: bool = True,
    report: Report = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Write one row per readable molecule: `source_id`, `smiles` (canonical), `embedding` (float32, D numbers).

    Rows that are no molecules go to a second file beside `out`, with the reason.

    Args:
        model_path: directory made by `hmoe export`.
        source: what `hmoe prepare` reads.
        out: Parquet file to write.
        smiles_column: column with SMILES, in files with a header.
        id_column: column with identifiers, in files with a header.
        standardize: embed the standard form of each molecule, as `hmoe prepare` stores it.
        report: called with (stage, rows done, None).

    Returns:
        Counts of molecules and rejects, the embedding's dimensions, the files written.

    Raises:
        ModelFormatError: no exported model at `model_path`.
        UsageError: no such source or column.
        PipelineError: no row of the source is a molecule.
    """
    sources = resolve_sources([source])
    for entry in sources:
        check_columns(entry, smiles_column, id_column)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HMoEModel.from_pretrained(model_path).to(device)
    width = model.config.hidden_size
    out = Path(out)
    rejects_path = out.with_name(out.stem + ".rejects.parquet")
    out.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [("source_id", pa.string()), ("smiles", pa.string()), ("embedding", pa.list_(pa.float32(), width))]
    )
    molecules = rejected = 0
    with pq.ParquetWriter(out, schema) as rows_file, pq.ParquetWriter(rejects_path, REJECT_SCHEMA) as rejects_file:
        for entry in sources:
            for chunk in read_chunks(entry, smiles_column=smiles_column, id_column=id_column, chunk_rows=CHUNK_ROWS):
                encoded = encode_rows(chunk.texts, chunk.ids, standardize=standardize)
                values = embed_batch(model, encoded.batch, device).reshape(-1)
                embedding = pa.FixedSizeListArray.from_arrays(pa.array(values), width)
                columns = [encoded.batch.column("source_id"), encoded.batch.column("smiles"), embedding]
                rows_file.write_batch(pa.record_batch(columns, schema=schema))
                rejects_file.write_batch(reject_batch(entry.name, chunk.first_row, encoded.rejects))
                molecules, rejected = molecules + encoded.batch.num_rows, rejected + len(encoded.rejects)
                report("embed", molecules + rejected, None)
    if not molecules:
        out.unlink()
        raise PipelineError(f"{source} holds no readable molecule: see {rejects_path} for what was wrong with each row")
    return {
        "molecules": molecules,
        "rejected": rejected,
        "dimensions": width,
        "out": str(out),
        "rejects": str(rejects_path),
    }


@torch.inference_mode()
def embed_batch(model: HMoEModel, molecules: pa.RecordBatch, device: str) -> NDArray[np.float32]:
    """Embeddings of encoded molecules, [rows, D]; they do not depend on what else is in the batch."""
    store = BatchStore(molecules)
    parts = [
        model.embed(gather(store, rows).to(device)).float().cpu().numpy()
        for rows in np.array_split(np.arange(len(store)), max(1, -(-len(store) // MOLECULES_PER_BATCH)))
        if len(rows)
    ]
    return np.concatenate(parts) if parts else np.empty((0, model.config.hidden_size), np.float32)
