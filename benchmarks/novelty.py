"""Does the novelty score of `hmoe embed --routing` rank unfamiliar scaffolds above familiar ones?

    python -m benchmarks.novelty models/hmoe data/pretrain moleculenet/*.csv

Familiar are molecules that the model was trained on, but for those it keeps to compare with; unfamiliar are those of
the tables whose scaffold's skeleton no molecule of the dataset has. Prints one JSON line with the ROC-AUC of telling
them apart (0.5: as a coin) by the score and, to compare with, by the cosine distance from the nearest group centre, by
the mean distances of the routing embedding and of the molecule's embedding from the nearest familiar ones, and by the
number of atoms; for all molecules, and for those of 20 to 30 atoms, as the two kinds differ in size. Writes it to
docs/results/novelty.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from benchmarks.result import write_result
from data_pipeline.molecules.encode import encode_rows
from hmoe_ds.data.batch import MolBatch, gather
from hmoe_ds.data.store import ShardStore
from hmoe_ds.data.table import Table
from hmoe_ds.downstream.familiarize import MOLECULES
from hmoe_ds.downstream.inference import batches_of
from hmoe_ds.model.familiar import NEIGHBOURS, Familiar
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.readout import mean_state

_SIZES = (20, 30)
Array = NDArray[np.float32]


class Molecules(NamedTuple):
    """What a model makes of B molecules.

    Attributes:
        readout_BD: what the scaffold gate sees.
        u_BP: routing embedding.
        embedding_BD: mean atom state.
        centre_B: cosine distance from the nearest group centre.
        atoms_B: number of atoms.
    """

    readout_BD: Array
    u_BP: Array
    embedding_BD: Array
    centre_B: Array
    atoms_B: Array


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder made by hmoe export")
    parser.add_argument("dataset", help="what it was trained on")
    parser.add_argument("tables", nargs="+", help="CSV files with molecules of other chemistry")
    parser.add_argument("--molecules", type=int, default=2000, help="of each kind, at most (default: 2000)")
    parser.add_argument("--reference", type=int, default=MOLECULES, help="familiar ones (default: as hmoe export has)")
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    model = HMoEModel.from_pretrained(options.model)
    store = ShardStore(options.dataset, "train")
    if len(store) <= options.reference:
        parser.error(
            f"{options.dataset} has {len(store)} molecules: give a --reference below that, to have some to score"
        )
    rows = generator.permutation(len(store))[: options.reference + options.molecules]
    reference, familiar = (_of_store(model, store, part) for part in np.split(rows, [options.reference]))
    encoded = _unfamiliar(options.dataset, options.tables)
    chosen = generator.permutation(encoded.num_rows)[: options.molecules]
    unfamiliar = _of_batches(model, batches_of(encoded.take(pa.array(np.sort(chosen)))))
    result = {
        "name": "novelty",
        "auc": _separation(reference, familiar, unfamiliar),
        "auc_20_to_30_atoms": _separation(reference, _of_size(familiar), _of_size(unfamiliar)),
        "familiar": len(familiar.atoms_B),
        "unfamiliar": len(unfamiliar.atoms_B),
        "reference": len(reference.atoms_B),
    }
    write_result(result)


def _separation(reference: Molecules, familiar: Molecules, unfamiliar: Molecules) -> dict[str, float]:
    """ROC-AUC of the two kinds, by several scores."""
    scores: dict[str, Callable[[Molecules], Array]] = {
        "novelty": _novelty(reference.readout_BD),
        "nearest group centre": lambda of: of.centre_B,
        "nearest routing embeddings": _nearest(reference.u_BP, "u_BP"),
        "nearest embeddings": _nearest(reference.embedding_BD, "embedding_BD"),
        "atoms": lambda of: of.atoms_B,
    }
    label = np.repeat([0, 1], [len(familiar.atoms_B), len(unfamiliar.atoms_B)])
    found = {name: np.concatenate([score(familiar), score(unfamiliar)]) for name, score in scores.items()}
    return {name: round(float(roc_auc_score(label, values)), 3) for name, values in found.items()}


def _novelty(reference: Array) -> Callable[[Molecules], Array]:
    """The score that `hmoe embed` tells."""
    known = Familiar.of(torch.from_numpy(reference))
    return lambda of: known.novelty(torch.from_numpy(of.readout_BD)).numpy()


def _nearest(reference: Array, name: str) -> Callable[[Molecules], Array]:
    """Mean distance from the nearest rows of `reference`."""
    index = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(reference)
    return lambda of: index.kneighbors(getattr(of, name))[0].mean(axis=1)


def _of_size(molecules: Molecules) -> Molecules:
    fits = (molecules.atoms_B >= _SIZES[0]) & (molecules.atoms_B <= _SIZES[1])
    return Molecules(*(values[fits] for values in molecules))


def _unfamiliar(dataset: str, tables: list[str]) -> pa.RecordBatch:
    """Molecules of the tables with a skeleton that the dataset does not have, each once."""
    known = pq.read_table(f"{dataset}/scaffolds.parquet", columns=["generic_key"])["generic_key"].to_numpy()
    texts = sorted({text for path in tables for text in Table.read(path).structures(None, option="a header")})
    molecules = encode_rows(texts, [""] * len(texts)).batch
    generic = molecules.column("generic_key").to_numpy()
    return molecules.filter(pa.array((generic != 0) & ~np.isin(generic, known)))


def _of_store(model: HMoEModel, store: ShardStore, rows: NDArray[np.int64]) -> Molecules:
    return _of_batches(model, (gather(store, np.sort(part)) for part in np.array_split(rows, -(-len(rows) // 256))))


@torch.inference_mode()
def _of_batches(model: HMoEModel, batches: Iterable[MolBatch]) -> Molecules:
    centers_GP = torch.nn.functional.normalize(model.encoder.scaffold_gate.centers.float(), dim=-1)
    parts = []
    for batch in batches:
        encoding = model(batch)
        u_BP = encoding.scaffold.u_BP
        centre_B = 1 - (u_BP @ centers_GP.t()).amax(dim=-1)
        embedding_BD = mean_state(encoding.h_ND, batch)
        columns = (encoding.scaffold.readout_BD, u_BP, embedding_BD, centre_B, batch.ptr_B.diff())
        parts.append([values.float().numpy() for values in columns])
    return Molecules(*map(np.concatenate, zip(*parts, strict=True)))


if __name__ == "__main__":
    main()
