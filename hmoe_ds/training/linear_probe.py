"""How well a linear model on frozen embeddings predicts labels: ridge regression, ROC-AUC, R2."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Penalties that are tried, per molecule: features have unit variance.
_PENALTIES = 10.0 ** np.arange(-4, 2.5, 0.5)
# Share of the largest entry below which the spread of a feature is rounding noise.
_NOISE = 1e-6


def ridge_predictions(train_nD: Array, label_n: Array, test_mD: Array) -> Array:
    """Fit a ridge regression and predict the labels of `test_mD`; -> [m]

    Features are standardised by the training molecules. The penalty is the one of `_PENALTIES` with the smallest
    leave-one-out error, which needs no refits: the residual of molecule i over `1 - h_ii`, h being the hat matrix
    (Hastie, Tibshirani, Friedman, "The Elements of Statistical Learning", 2nd edition, 7.10.1). With the singular
    values s of the features, `w = V diag(s / (s^2 + penalty)) U^T y`.
    """
    mean_D, scale_D = train_nD.mean(axis=0), train_nD.std(axis=0)
    scale_D[scale_D <= _NOISE * np.abs(train_nD).max()] = np.inf
    centre = label_n.mean()
    n = len(train_nD)
    left_nK, singular_K, right_KD = np.linalg.svd((train_nD - mean_D) / scale_D, full_matrices=False)
    share_PK = singular_K**2 / (singular_K**2 + n * _PENALTIES[:, None])
    projected_K = left_nK.T @ (label_n - centre)
    residual_nP = (label_n - centre)[:, None] - left_nK @ (share_PK * projected_K).T
    hat_nP = 1 / n + left_nK**2 @ share_PK.T
    best = int(np.argmin(((residual_nP / (1 - hat_nP)) ** 2).mean(axis=0)))
    weight_D = right_KD.T @ (singular_K / (singular_K**2 + n * _PENALTIES[best]) * projected_K)
    return centre + (test_mD - mean_D) / scale_D @ weight_D


def roc_auc(score_m: Array, label_m: Array) -> float:
    """Chance that a molecule of class 1 scores above one of class 0; a tie counts half (Mann-Whitney)."""
    place_m, count = np.unique(score_m, return_inverse=True, return_counts=True)[1:]
    rank_m = (np.cumsum(count) - (count - 1) / 2)[place_m]
    positive_m = label_m == 1
    positives, negatives = positive_m.sum(), (~positive_m).sum()
    return float((rank_m[positive_m].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def r_squared(predicted_m: Array, label_m: Array) -> float:
    """Share of the labels' variance that is explained: 1 is perfect, 0 no better than their mean, below 0 worse."""
    return float(1 - ((label_m - predicted_m) ** 2).sum() / ((label_m - label_m.mean()) ** 2).sum())
