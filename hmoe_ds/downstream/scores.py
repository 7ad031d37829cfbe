"""How good predictions are: ROC-AUC and average precision of classes, RMSE, MAE and R2 of quantities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, mean_absolute_error, r2_score, roc_auc_score

Task = Literal["classification", "regression"]
Array = NDArray[np.float64]

# What a fit is chosen by, and a table shows.
PRIMARY: dict[Task, str] = {"classification": "roc_auc", "regression": "rmse"}
# Resamples, and how many of them are in memory at a time.
_RESAMPLES, _BLOCK = 1000, 50
# Of fewer molecules resamples tell nothing.
FEWEST_FOR_INTERVAL = 5


class Scores(NamedTuple):
    """Of predictions of n molecules.

    Attributes:
        means: each metric, averaged over the targets that have it.
        by_target: each metric of each target; nan where it has none.
        counted: targets that have them: of classes those with both among the labels.
    """

    means: dict[str, float]
    by_target: dict[str, list[float]]
    counted: int


def score(task: Task, predicted_nT: Array, label_nT: Array) -> Scores:
    """Compare predictions with labels; NaN labels are left out.

    Args:
        task: what the labels are.
        predicted_nT: numbers that grow with the chance of class 1, or quantities.
        label_nT: 0 or 1, or quantities.
    """
    metrics = _classification if task == "classification" else _regression
    rows = []
    for predicted_n, label_n in zip(predicted_nT.T, label_nT.T, strict=True):
        known_n = ~np.isnan(label_n)
        rows.append(metrics(predicted_n[known_n], label_n[known_n]))
    by_target = {name: [row[name] for row in rows] for name in rows[0]}
    counted = int(np.isfinite(by_target[PRIMARY[task]]).sum())
    return Scores({name: _known_mean(values) for name, values in by_target.items()}, by_target, counted)


def _known_mean(values: list[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def is_better(task: Task, value: float, best: float) -> bool:
    """Whether a value of the primary metric beats the best one; nan beats none."""
    return value > best if task == "classification" else value < best


def worst(task: Task) -> float:
    """What every value of the primary metric beats."""
    return -np.inf if task == "classification" else np.inf


def confidence_interval(
    task: Task, predicted_nT: Array, label_nT: Array, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Of the primary metric's mean over targets: the percentile bootstrap over molecules (Efron, 1979).

    Targets without the metric in a resample are left out of its mean. There is none, but NaN, for fewer than
    `FEWEST_FOR_INTERVAL` molecules.

    Args:
        task: what the labels are.
        predicted_nT: as of `score`.
        label_nT: as of `score`.
        seed: of the resamples.
        level: how often such an interval should hold the true value.
    """
    n, generator = len(label_nT), np.random.default_rng(seed)
    if n < FEWEST_FOR_INTERVAL:
        return float("nan"), float("nan")
    blocks = []
    for _ in range(_RESAMPLES // _BLOCK):
        draws_RS = generator.integers(0, n, (_BLOCK, n))
        weight_Rn = np.stack([np.bincount(draws, minlength=n) for draws in draws_RS]).astype(np.float64)
        blocks.append(_resampled_means(task, predicted_nT, label_nT, weight_Rn))
    means_R = np.concatenate(blocks)
    tail = 100 * (1 - level) / 2
    if not np.isfinite(means_R).any() or not np.isfinite(predicted_nT).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(means_R, [tail, 100 - tail])
    return float(low), float(high)


def _resampled_means(task: Task, predicted_nT: Array, label_nT: Array, weight_Rn: Array) -> Array:
    """The primary metric's mean over targets under R weightings of the molecules; nan where no target has it; -> [R]"""
    metric = _weighted_auc if task == "classification" else _weighted_rmse
    values = []
    for predicted_n, label_n in zip(predicted_nT.T, label_nT.T, strict=True):
        known_n = ~np.isnan(label_n)
        values.append(metric(predicted_n[known_n], label_n[known_n], weight_Rn[:, known_n]))
    values_TR = np.stack(values)
    known_TR = np.isfinite(values_TR)
    counts_R = known_TR.sum(axis=0)
    return np.where(known_TR, values_TR, 0).sum(axis=0) / np.where(counts_R > 0, counts_R, np.nan)


def summary(task: Task, targets: Sequence[str], predicted_nT: Array, label_nT: Array, seed: int = 0) -> dict[str, Any]:
    """Means of all metrics, the interval of the primary one, the counts behind them; the same of each target."""
    scores = score(task, predicted_nT, label_nT)
    interval = f"{PRIMARY[task]}_95"
    by_target = {}
    for place, name in enumerate(targets):
        column = slice(place, place + 1)
        known_n = ~np.isnan(label_nT[:, place])
        by_target[name] = {
            **{metric: values[place] for metric, values in scores.by_target.items()},
            interval: confidence_interval(task, predicted_nT[known_n, column], label_nT[known_n, column], seed),
            "molecules": int(known_n.sum()),
        }
    return {
        **scores.means,
        interval: confidence_interval(task, predicted_nT, label_nT, seed),
        "molecules": len(label_nT),
        "targets": label_nT.shape[1],
        "targets_counted": scores.counted,
        "by_target": by_target,
    }


def _classification(predicted_n: Array, label_n: Array) -> dict[str, float]:
    if len(np.unique(label_n)) < 2 or not np.isfinite(predicted_n).all():
        return {"roc_auc": float("nan"), "average_precision": float("nan")}
    return {
        "roc_auc": float(roc_auc_score(label_n, predicted_n)),
        "average_precision": float(average_precision_score(label_n, predicted_n)),
    }


def _regression(predicted_n: Array, label_n: Array) -> dict[str, float]:
    if not len(label_n) or not np.isfinite(predicted_n).all():
        return dict.fromkeys(("rmse", "mae", "r2"), float("nan"))
    return {
        "rmse": float(np.sqrt(np.mean((predicted_n - label_n) ** 2))),
        "mae": float(mean_absolute_error(label_n, predicted_n)),
        "r2": float(r2_score(label_n, predicted_n)) if len(label_n) > 1 else float("nan"),
    }


def _weighted_auc(predicted_n: Array, label_n: Array, weight_Rn: Array) -> Array:
    """ROC-AUC under R weightings of the molecules; nan where one class has no weight; -> [R]

    The share of pairs of a molecule of class 1 and one of class 0 in which the former scores higher; a tie counts half.
    """
    if not len(label_n):
        return np.full(len(weight_Rn), np.nan)
    order_n = np.argsort(predicted_n, kind="stable")
    _, first_U = np.unique(predicted_n[order_n], return_index=True)
    positive_RU = np.add.reduceat(weight_Rn[:, order_n] * label_n[order_n], first_U, axis=1)
    negative_RU = np.add.reduceat(weight_Rn[:, order_n] * (1 - label_n[order_n]), first_U, axis=1)
    below_RU = np.cumsum(negative_RU, axis=1) - negative_RU / 2
    pairs_R = positive_RU.sum(axis=1) * negative_RU.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (positive_RU * below_RU).sum(axis=1) / pairs_R


def _weighted_rmse(predicted_n: Array, label_n: Array, weight_Rn: Array) -> Array:
    """Root of the mean squared error under R weightings of the molecules; -> [R]"""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(weight_Rn @ (predicted_n - label_n) ** 2 / weight_Rn.sum(axis=1))


def without_nan(value: Any) -> Any:
    """Plain values for JSON, which knows no nan: None in its place."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
