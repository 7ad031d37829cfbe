"""Does the novelty score of `hmoe embed --routing` rank unfamiliar scaffolds above familiar ones?

    python -m benchmarks.novelty models/hmoe data/pretrain moleculenet/*.csv

Familiar are molecules that the model was trained on; unfamiliar are those of the tables whose scaffold's skeleton no
molecule of the dataset has. Prints one JSON line with the ROC-AUC of telling them apart (0.5: as a coin) by the
distance from the nearest group centre and, to compare with, by the mean distances of the routing embedding, and of the
molecule's embedding, from the nearest of 20,000 familiar molecules, and by the number of atoms; writes it to
docs/results/novelty.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from benchmarks.result import write_result
from data_pipeline.encode import encode_rows
from hmoe_ds.data.batch import MolBatch, gather
from hmoe_ds.data.store import ShardStore
from hmoe_ds.data.table import Table
from hmoe_ds.downstream.inference import batches_of
from hmoe_ds.model.hmoe import HMoEModel

_REFERENCE, _NEIGHBOURS = 20_000, 5
Array = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder made by hmoe export")
    parser.add_argument("dataset", help="what it was trained on")
    parser.add_argument("tables", nargs="+", help="CSV files with molecules of other chemistry")
    parser.add_argument("--molecules", type=int, default=2000, help="of each kind, at most (default: 2000)")
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    model = HMoEModel.from_pretrained(options.model)
    store = ShardStore(options.dataset, "train")
    rows = generator.permutation(len(store))[: _REFERENCE + options.molecules]
    reference, familiar = (_of_store(model, store, part) for part in np.split(rows, [_REFERENCE]))
    encoded = _unfamiliar(options.dataset, options.tables)
    chosen = generator.permutation(encoded.num_rows)[: options.molecules]
    unfamiliar = _of_batches(model, batches_of(encoded.take(pa.array(np.sort(chosen)))))
    label = np.repeat([0, 1], [len(familiar[0]), len(unfamiliar[0])])
    figures = {}
    for name, place in (("nearest group centre", 0), ("atoms", 3)):
        figures[name] = roc_auc_score(label, np.concatenate([familiar[place], unfamiliar[place]]))
    for name, place in (("nearest routing embeddings", 1), ("nearest embeddings", 2)):
        index = NearestNeighbors(n_neighbors=_NEIGHBOURS).fit(reference[place])
        distances = [index.kneighbors(part[place])[0].mean(axis=1) for part in (familiar, unfamiliar)]
        figures[name] = roc_auc_score(label, np.concatenate(distances))
    result = {
        "name": "novelty",
        "auc": {name: round(float(value), 3) for name, value in figures.items()},
        "familiar": len(familiar[0]),
        "unfamiliar": len(unfamiliar[0]),
    }
    write_result(result)


def _unfamiliar(dataset: str, tables: list[str]) -> pa.RecordBatch:
    """Molecules of the tables with a skeleton that the dataset does not have, each once."""
    known = pq.read_table(f"{dataset}/scaffolds.parquet", columns=["generic_key"])["generic_key"].to_numpy()
    texts = sorted({text for path in tables for text in Table.read(path).smiles(None, option="a header")})
    molecules = encode_rows(texts, [""] * len(texts)).batch
    generic = molecules.column("generic_key").to_numpy()
    return molecules.filter(pa.array((generic != 0) & ~np.isin(generic, known)))


def _of_store(model: HMoEModel, store: ShardStore, rows: NDArray[np.int64]) -> tuple[Array, Array, Array, Array]:
    return _of_batches(model, (gather(store, np.sort(part)) for part in np.array_split(rows, -(-len(rows) // 256))))


@torch.inference_mode()
def _of_batches(model: HMoEModel, batches: Iterable[MolBatch]) -> tuple[Array, Array, Array, Array]:
    """-> (distance from the nearest centre, routing embedding, embedding, atoms) of all molecules."""
    parts = []
    for batch in batches:
        encoding = model(batch)
        u_BP = encoding.scaffold.u_BP
        distance_B = model.encoder.scaffold_gate.distance(u_BP)
        parts.append((distance_B, u_BP, model.readout(encoding.h_ND, batch), batch.ptr_B.diff().float()))
    nearest, routing, embedding, atoms = (torch.cat(column).float().numpy() for column in zip(*parts, strict=True))
    return nearest, routing, embedding, atoms


if __name__ == "__main__":
    main()
