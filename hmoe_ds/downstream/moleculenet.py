"""The MoleculeNet sets by which pretrained encoders of molecules are compared, and how they are split.

Wu et al., "MoleculeNet: a benchmark for molecular machine learning", 2018; by the protocol of Hu et al., "Strategies
for Pre-training Graph Neural Networks", 2020: the deterministic scaffold split, the epoch that is best on validation,
ROC-AUC averaged over the targets that have both classes in the test set, and RMSE.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rdkit import Chem, rdBase

from data_pipeline.errors import UsageError
from data_pipeline.molecules.encode_supervised import encode_supervised
from data_pipeline.sources.columns import listed
from hmoe_ds.data.table import MISSING, Table
from hmoe_ds.downstream.baselines import ecfp
from hmoe_ds.downstream.labelled_table import check_classes
from hmoe_ds.downstream.scores import Array, Task
from hmoe_ds.downstream.splits import SIDES, Split, scaffold_split, scaffold_with_chirality

TASKS: dict[str, Task] = {
    **dict.fromkeys(("bbbp", "bace", "clintox", "sider", "tox21", "toxcast", "hiv", "muv"), "classification"),
    **dict.fromkeys(("esol", "freesolv", "lipo"), "regression"),
}
# Names of the labels in files that have other columns of numbers. Of other sets, all columns of classes are labels.
_LABELS = {
    "bbbp": ("p_np",),
    "bace": ("Class",),
    "clintox": ("FDA_APPROVED", "CT_TOX"),
    "hiv": ("HIV_active",),
    "esol": ("logSolubility", "measured log solubility in mols per litre"),
    "freesolv": ("freesolv", "expt"),
    "lipo": ("lipo", "exp"),
}
_ENDINGS = (".csv", ".csv.gz")
# What the files of MoleculeNet itself are called, where that is more than another case.
_OTHER_NAMES = {
    "delaney-processed": "esol",
    "sampl": "freesolv",
    "lipophilicity": "lipo",
    "toxcast_data": "toxcast",
}


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

    @property
    def shared_scaffolds(self) -> int:
        """Test molecules whose scaffold training has, too, in the form that is learned from."""
        scaffolds = [scaffold_with_chirality(text) for text in self.molecules.column("smiles").to_pylist()]
        known = {scaffolds[place] for place in self.split.train}
        return sum(scaffolds[place] in known for place in self.split.test)

    @cached_property
    def fingerprint_nV(self) -> NDArray[np.uint8]:
        """Of each molecule (`baselines.ecfp`)."""
        return ecfp(self.smiles)


def files_of_sets(folder: Path, sets: Collection[str] = ()) -> dict[str, Path]:
    """The files of `sets` in `folder`, by the names of the sets; without any, all files that are sets.

    Files have these names, or those that MoleculeNet gives them; capitals do not matter.

    Raises:
        UsageError: there are none, or a set is not there; two files are of one set.
    """
    found: dict[str, list[Path]] = {name: [] for name in TASKS}
    for path in sorted(folder.glob("*")):
        name = _set_name(path.name)
        if name is not None and path.is_file():
            found[name].append(path)
    there = [name for name, paths in found.items() if paths]
    if not there:
        raise UsageError(
            f"--data {folder} has none of the files {', '.join(f'{name}.csv' for name in TASKS)}, nor one of those "
            "that MoleculeNet calls otherwise"
        )
    wanted = [name.lower() for name in sets]
    wrong = [name for name in wanted if name not in there]
    if wrong:
        raise UsageError(f"--sets {', '.join(wrong)}: {folder} has {', '.join(there)}")
    chosen = {name: found[name] for name in there if not wanted or name in wanted}
    for name, (first, *others) in chosen.items():
        if others:
            raise UsageError(f"--data {folder} has {first.name} and {others[0].name}, both of {name}: leave one there")
    return {name: paths[0] for name, paths in chosen.items()}


def _set_name(file: str) -> str | None:
    """The set, as in `TASKS`, that a file of this name is; None for another file."""
    stems = [file.lower().removesuffix(ending) for ending in _ENDINGS if file.lower().endswith(ending)]
    names = [_OTHER_NAMES.get(stem, stem) for stem in stems]
    return next((name for name in names if name in TASKS), None)


def read_set(name: str, path: Path, standardize: bool) -> BenchmarkSet:
    """Read, encode and split a set.

    Args:
        name: as in `TASKS`.
        path: of its file.
        standardize: encode the standard form of each molecule. The split is by the molecules as they are written.

    Raises:
        UsageError: no column of SMILES or of labels, a label that is no class; a side of the split without molecules.
    """
    table = Table.read(str(path))
    smiles = table.structures(None, option="a header `smiles`")
    targets = _targets(name, path, table)
    label_RT = np.stack([table.labels(column) for column in targets], axis=1)
    check_classes(str(path), targets, TASKS[name], label_RT)
    encoded = encode_supervised(path.name, smiles, standardize)
    with rdBase.BlockLogs():  # an InChI or a mol block can be encoded, but the protocol is of SMILES
        is_smiles_n = ["\n" not in smiles[row] and Chem.MolFromSmiles(smiles[row]) is not None for row in encoded.kept]
    rows = encoded.kept[is_smiles_n]
    kept = [smiles[row] for row in rows]
    split = scaffold_split(kept)
    for side, places in zip(SIDES, split, strict=True):
        if not len(places):
            raise UsageError(
                f"{path}: the scaffold split of its {len(kept)} molecules leaves none for {side}: leave it out"
            )
    molecules = encoded.batch.filter(pa.array(is_smiles_n))
    return BenchmarkSet(name, TASKS[name], kept, molecules, label_RT[rows], targets, split, len(smiles) - len(kept))


def _targets(name: str, path: Path, table: Table) -> list[str]:
    """The columns of labels."""
    if name in _LABELS:
        found = [column for column in table.header if column in _LABELS[name]]
    else:
        found = [column for column in table.header if column and _holds_classes(table.column(column))]
    if not found:
        expected = " or ".join(map(repr, _LABELS.get(name, ("columns of 0 and 1",))))
        raise UsageError(f"{path} has no column of labels among {listed(table.header)}: expected {expected}")
    return found


def _holds_classes(cells: list[str]) -> bool:
    known = {cell for cell in cells if cell.lower() not in MISSING}
    return bool(known) and known <= {"0", "1", "0.0", "1.0"}
