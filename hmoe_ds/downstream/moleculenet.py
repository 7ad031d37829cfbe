"""The MoleculeNet sets by which pretrained encoders of molecules are compared, and how they are split.

Wu et al., "MoleculeNet: a benchmark for molecular machine learning", 2018; by the protocol of Hu et al., "Strategies
for Pre-training Graph Neural Networks", 2020: the deterministic scaffold split, the epoch that is best on validation,
ROC-AUC averaged over the targets that have both classes in the test set, and RMSE.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.encode import encode_rows
from data_pipeline.errors import UsageError
from hmoe_ds.data.table import Table
from hmoe_ds.downstream.scores import Array, Task
from hmoe_ds.downstream.splits import Split, scaffold_split

TASKS: dict[str, Task] = {
    **dict.fromkeys(("bbbp", "bace", "clintox", "sider", "tox21", "toxcast", "hiv", "muv"), "classification"),
    **dict.fromkeys(("esol", "freesolv", "lipo"), "regression"),
}
_ENDINGS = (".csv", ".csv.gz")


@dataclass(frozen=True)
class BenchmarkSet:
    """One set, read and split: n molecules, T targets.

    Args:
        name: as in `TASKS`.
        task: what its labels are.
        smiles: of the molecules, as they are written.
        molecules: encoded, in the same order.
        label_nT: NaN where there is none.
        targets: names of the columns of labels.
        split: of the molecules.
        unreadable: rows that are no molecules.
    """

    name: str
    task: Task
    smiles: list[str]
    molecules: pa.RecordBatch
    label_nT: Array
    targets: list[str]
    split: Split
    unreadable: int


def available(folder: Path) -> dict[str, Path]:
    """The files in `folder` that are sets, by their names.

    Raises:
        UsageError: there are none.
    """
    found = {name: path for name in TASKS for path in [_file(folder, name)] if path is not None}
    if not found:
        raise UsageError(f"--data {folder} has none of the files {', '.join(f'{name}.csv' for name in TASKS)}")
    return found


def _file(folder: Path, name: str) -> Path | None:
    return next((folder / f"{name}{ending}" for ending in _ENDINGS if (folder / f"{name}{ending}").is_file()), None)


def read_set(name: str, path: Path, standardize: bool) -> BenchmarkSet:
    """Read, encode and split a set.

    Args:
        name: as in `TASKS`.
        path: of its file; all columns but that of SMILES are labels.
        standardize: encode the standard form of each molecule. The split is by the molecules as they are written.
    """
    table = Table.read(str(path))
    smiles = table.smiles(None, option="a header `smiles`")
    structure = next(column for column in table.header if table.column(column) == smiles)
    targets = [column for column in table.header if column and column != structure]
    label_RT = np.stack([table.labels(column) for column in targets], axis=1)
    encoded = encode_rows(smiles, [""] * len(smiles), standardize=standardize)
    kept = [smiles[row] for row in encoded.kept]
    split = scaffold_split(kept)
    return BenchmarkSet(
        name, TASKS[name], kept, encoded.batch, label_RT[encoded.kept], targets, split, len(encoded.rejects)
    )
