"""What a pretrained encoder is compared with: a random forest on fingerprints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase
from rdkit.Chem import rdFingerprintGenerator
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from hmoe_ds.downstream.scores import Array, Task
from hmoe_ds.downstream.splits import Rows

_RADIUS, _BITS, _TREES = 2, 2048, 500


def ecfp(smiles: Sequence[str]) -> NDArray[np.uint8]:
    """Morgan fingerprints of radius 2 folded to 2,048 bits (Rogers and Hahn, 2010, as ECFP4); -> [n, 2048]"""
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=_RADIUS, fpSize=_BITS)
    with rdBase.BlockLogs():
        return np.stack([generator.GetFingerprintAsNumPy(Chem.MolFromSmiles(text)) for text in smiles])


def forest_predictions(fingerprint_nV: NDArray[np.uint8], label_nT: Array, train: Rows, task: Task, seed: int) -> Array:
    """Fit a forest of 500 trees to each target's labelled molecules of `train`; predictions of all molecules, [n, T].

    A target with one class among them gets this class everywhere, one without any labels 0.
    """
    columns = []
    for label_n in label_nT.T:
        rows = train[~np.isnan(label_n[train])]
        if not len(rows):
            columns.append(np.zeros(len(label_n)))
            continue
        if task == "regression":
            forest = RandomForestRegressor(_TREES, random_state=seed, n_jobs=-1).fit(
                fingerprint_nV[rows], label_n[rows]
            )
            columns.append(forest.predict(fingerprint_nV))
            continue
        forest = RandomForestClassifier(_TREES, random_state=seed, n_jobs=-1).fit(fingerprint_nV[rows], label_n[rows])
        chances = forest.predict_proba(fingerprint_nV)
        columns.append(chances[:, 1] if chances.shape[1] > 1 else np.full(len(label_n), forest.classes_[0]))
    return np.stack(columns, axis=1)
