"""The scale on which quantities are fitted: that of the labels of the training side."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # scikit-learn takes long to import
    from hmoe_ds.downstream.scores import Array, Task


class LabelScale(NamedTuple):
    """Mean and standard deviation of quantities on the training side, by which a head is fitted; 0 and 1 for classes.

    Attributes:
        mean_T: of each target.
        deviation_T: of each target.
    """

    mean_T: list[float]
    deviation_T: list[float]


def label_scale(task: Task, label_nT: Array) -> LabelScale:
    """Of the labels of a training side; a target that does not vary there has deviation 1."""
    targets = label_nT.shape[1]
    if task == "classification":
        return LabelScale([0.0] * targets, [1.0] * targets)
    deviation_T = np.nanstd(label_nT, axis=0)
    return LabelScale(np.nanmean(label_nT, axis=0).tolist(), np.where(deviation_T > 0, deviation_T, 1.0).tolist())


def scaled_back(output_nT: Array, scale: LabelScale) -> Array:
    """Outputs of a head on the scale of the labels."""
    return output_nT * scale.deviation_T + scale.mean_T
