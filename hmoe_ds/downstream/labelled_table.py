"""A user's table of molecules with labels, encoded and checked: what can be learned from it, or why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.errors import UsageError
from data_pipeline.molecules.encode_supervised import encode_supervised
from data_pipeline.molecules.rejects import rejects_in_words
from data_pipeline.sources.streams import file_name
from hmoe_ds.data.table import Table
from hmoe_ds.downstream.scores import Array, Task

Conflicts = Literal["error", "keep", "drop", "mean"]
_SHOWN = 3
_NO_LABEL, _CONFLICT = "no label", "conflicting labels"


@dataclass(frozen=True)
class LabelledTable:
    """Rows of a table: n of them are molecules with a label.

    Args:
        table: all rows.
        smiles: structure of each row of the table, as it is shown (`shown_structures`).
        molecules: the n encoded molecules.
        row_n: their rows, ascending.
        label_nT: their labels; NaN where a target has none.
        reasons: rows that are not among them, and why.
    """

    table: Table
    smiles: list[str]
    molecules: pa.RecordBatch
    row_n: NDArray[np.int64]
    label_nT: Array
    reasons: dict[int, str]

    @property
    def canonical(self) -> list[str]:
        """Canonical SMILES of each of the n molecules, in the form that is learned from."""
        return self.molecules.column("smiles").to_pylist()

    @property
    def keys(self) -> list[bytes]:
        """Identity of each of the n molecules."""
        return self.molecules.column("mol_key").to_pylist()


def read_labelled_table(
    path: str,
    targets: Sequence[str],
    task: Task,
    smiles_column: str | None = None,
    standardize: bool = True,
    conflicts: Conflicts = "error",
) -> LabelledTable:
    """Read, encode and check a table.

    Args:
        path: CSV file with a header, Parquet, Arrow or SDF; or its URL.
        targets: columns of labels; a row may lack some.
        task: what the labels are: 0 and 1, or quantities.
        smiles_column: column of SMILES; found by itself without it.
        standardize: encode the standard form of each molecule.
        conflicts: what to do about rows of one molecule that have different labels: `error` refuses the table, `keep`
            learns from all of them, `drop` from none, `mean` (of quantities) gives all of them their mean.

    Raises:
        UsageError: no such file or column, a label that is no number or no class, a target with one class or none, rows
            in conflict.
    """
    table = Table.read(path)
    texts = table.structures(smiles_column, option="--smiles-column")
    label_RT = np.stack([table.labels(name) for name in targets], axis=1)
    check_classes(path, targets, task, label_RT)
    encoded = encode_supervised(file_name(path), texts, standardize)
    reasons = {reject.index: reject.reason for reject in encoded.rejects}
    has_label_n = ~np.isnan(label_RT[encoded.kept]).all(axis=1)
    reasons |= {int(row): _NO_LABEL for row in encoded.kept[~has_label_n]}
    found = LabelledTable(
        table,
        shown_structures(texts, encoded.kept, encoded.batch),
        encoded.batch.filter(pa.array(has_label_n)),
        encoded.kept[has_label_n],
        label_RT[encoded.kept[has_label_n]],
        reasons,
    )
    found = _without_conflicts(found, path, targets, task, conflicts)
    _check_learnable(path, targets, task, found)
    return found


def shown_structures(texts: Sequence[str], kept: NDArray[np.int64], molecules: pa.RecordBatch) -> list[str]:
    """Structures as they were read; of mol blocks, which have many lines, the SMILES of those that are molecules.

    Args:
        texts: the structures.
        kept: places of those that are molecules.
        molecules: these, encoded.
    """
    shown = ["" if "\n" in text else text for text in texts]
    for place, smiles in zip(kept.tolist(), molecules.column("smiles").to_pylist(), strict=True):
        shown[place] = shown[place] or smiles
    return shown


def check_classes(path: str, targets: Sequence[str], task: Task, label_RT: Array) -> None:
    """Raise UsageError if the labels are to be classes, and one of them is none."""
    if task == "regression":
        return
    for target, label_R in zip(targets, label_RT.T, strict=True):
        others = np.flatnonzero(~np.isnan(label_R) & ~np.isin(label_R, (0, 1)))
        if len(others):
            raise UsageError(
                f"{path} has the label {label_R[others[0]]:g} in row {others[0] + 1} of column {target!r}: expected 0, "
                "1 or an empty cell; for quantities give --task regression"
            )


def _without_conflicts(
    found: LabelledTable, path: str, targets: Sequence[str], task: Task, conflicts: Conflicts
) -> LabelledTable:
    places_of: dict[bytes, list[int]] = {}
    for place, key in enumerate(found.keys):
        places_of.setdefault(key, []).append(place)
    bad = [
        (places, target)
        for places in places_of.values()
        if len(places) > 1
        for target in range(len(targets))
        if len(np.unique(_known(found.label_nT[places, target]))) > 1
    ]
    if not bad or conflicts == "keep":
        return found
    if conflicts == "mean":
        label_nT = found.label_nT.copy()
        for places, target in bad:
            known = [place for place in places if not np.isnan(label_nT[place, target])]
            label_nT[known, target] = label_nT[known, target].mean()
        return replace(found, label_nT=label_nT)
    if conflicts == "drop":
        dropped = sorted({place for places, _ in bad for place in places})
        reasons = found.reasons | {int(found.row_n[place]): _CONFLICT for place in dropped}
        keep_n = ~np.isin(np.arange(len(found.row_n)), dropped)
        return LabelledTable(
            table=found.table,
            smiles=found.smiles,
            molecules=found.molecules.filter(pa.array(keep_n)),
            row_n=found.row_n[keep_n],
            label_nT=found.label_nT[keep_n],
            reasons=reasons,
        )
    others = "keep or drop" if task == "classification" else "keep, drop or mean"
    shown = "; ".join(_told(found, places, targets[target], target) for places, target in bad[:_SHOWN])
    raise UsageError(
        f"{path} has {len({tuple(places) for places, _ in bad})} molecules with different labels in different rows: "
        f"{shown}; mend the table, or say what to do with --conflicts {others}"
    )


def _told(found: LabelledTable, places: list[int], target: str, column: int) -> str:
    labels = ", ".join(f"{found.label_nT[place, column]:g} in row {found.row_n[place] + 1}" for place in places[:4])
    return f"{found.smiles[found.row_n[places[0]]][:60]!r} has {target!r} {labels}"


def _check_learnable(path: str, targets: Sequence[str], task: Task, found: LabelledTable) -> None:
    if not len(found.row_n):
        reasons = Counter(found.reasons.values())
        if reasons[_CONFLICT]:
            raise UsageError(f"{path} has no molecule left, as all with labels are in conflict: mend their labels")
        if not reasons[_NO_LABEL]:
            why = rejects_in_words(dict(reasons.most_common()))
            raise UsageError(
                f"{path} has no structure that can be read ({why or 'no rows'}): name the column that has them with "
                "--smiles-column"
            )
        raise UsageError(f"{path} has no molecule with a label in {', '.join(map(repr, targets))}: name other columns")
    for target, label_n in zip(targets, found.label_nT.T, strict=True):
        values = np.unique(_known(label_n))
        if len(values) > 1:
            with np.errstate(over="ignore"):
                if not np.isfinite(np.std(_known(label_n))):
                    raise UsageError(
                        f"{path} has labels up to {abs(values).max():g} in column {target!r}: scale them down"
                    )
            continue
        what = f"only the label {values[0]:g}" if len(values) else "no label"
        expected = "both classes, 0 and 1" if task == "classification" else "a quantity that varies"
        raise UsageError(
            f"{path} has {what} in column {target!r}, over {len(label_n)} molecules: expected {expected}; leave it out "
            "of --target"
        )


def _known(values: Array) -> Array:
    return values[~np.isnan(values)]
