"""Scores against scikit-learn, intervals against their definition."""

import math

import numpy as np
import pytest
from sklearn.metrics import mean_squared_error, roc_auc_score

from hmoe_ds.downstream.scores import confidence_interval, score, summary


def two_targets():
    generator = np.random.default_rng(0)
    label = generator.integers(0, 2, (120, 2)).astype(float)
    predicted = np.round(label + generator.normal(size=(120, 2)), 1)  # with ties
    label[::7, 1] = np.nan
    return predicted, label


def test_missing_labels_are_left_out_and_targets_averaged():
    predicted, label = two_targets()
    found = score("classification", predicted, label)
    known = ~np.isnan(label[:, 1])
    expected = [roc_auc_score(label[:, 0], predicted[:, 0]), roc_auc_score(label[known, 1], predicted[known, 1])]
    assert found.by_target["roc_auc"] == pytest.approx(expected)
    assert found.means["roc_auc"] == pytest.approx(np.mean(expected))
    assert found.counted == 2


def test_a_target_with_one_class_is_not_counted():
    predicted, label = two_targets()
    label[:, 0] = 1
    found = score("classification", predicted, label)
    assert found.counted == 1
    assert math.isnan(found.by_target["roc_auc"][0])
    assert found.means["roc_auc"] == found.by_target["roc_auc"][1]
    assert math.isnan(score("classification", predicted[:, :1], label[:, :1]).means["roc_auc"])


def test_quantities():
    generator = np.random.default_rng(1)
    label, predicted = generator.normal(size=(50, 1)), generator.normal(size=(50, 1))
    found = score("regression", predicted, label)
    assert found.means["rmse"] == pytest.approx(math.sqrt(mean_squared_error(label, predicted)))
    assert found.means["mae"] == pytest.approx(np.abs(label - predicted).mean())


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_interval_is_that_of_scores_of_resampled_molecules(task):
    """Against the definition: draw, score with scikit-learn, take percentiles."""
    predicted, label = two_targets()
    draws = np.random.default_rng(5).integers(0, 120, (1000, 120))
    metric = {"classification": "roc_auc", "regression": "rmse"}[task]
    values = [score(task, predicted[rows], label[rows]).means[metric] for rows in draws]
    assert confidence_interval(task, predicted, label, seed=5) == pytest.approx(np.percentile(values, [2.5, 97.5]))


def test_an_interval_of_one_class_is_not_a_number():
    low, high = confidence_interval("classification", np.zeros((5, 1)), np.ones((5, 1)), seed=0)
    assert math.isnan(low)
    assert math.isnan(high)


def test_more_molecules_give_a_narrower_interval():
    generator = np.random.default_rng(2)
    widths = []
    for count in (100, 1600):
        label = generator.normal(size=(count, 1))
        low, high = confidence_interval("regression", label + generator.normal(size=label.shape), label, seed=0)
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.3)


def test_a_summary_has_the_counts():
    predicted, label = two_targets()
    found = summary("classification", ["one", "other"], predicted, label)
    assert (found["molecules"], found["targets"], found["targets_counted"]) == (120, 2, 2)
    low, high = found["roc_auc_95"]
    assert low < found["roc_auc"] < high


def test_a_summary_has_each_target_as_if_it_were_alone():
    predicted, label = two_targets()
    label[:100, 1] = np.nan
    found = summary("classification", ["one", "other"], predicted, label)
    for place, name in enumerate(["one", "other"]):
        known = ~np.isnan(label[:, place])
        alone = summary("classification", [name], predicted[known, place : place + 1], label[known, place : place + 1])
        assert found["by_target"][name] == alone["by_target"][name]
        assert found["by_target"][name]["roc_auc"] == alone["roc_auc"]
        assert found["by_target"][name]["molecules"] == known.sum()
    assert found["roc_auc"] == pytest.approx(np.mean([each["roc_auc"] for each in found["by_target"].values()]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_one_molecule_has_no_interval(task):
    found = summary(task, ["one"], np.array([[0.5]]), np.array([[1.0]]))
    assert all(map(math.isnan, found["rmse_95" if task == "regression" else "roc_auc_95"]))
    assert math.isnan(found["r2" if task == "regression" else "roc_auc"])


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_predictions_that_are_not_finite_have_no_score(task):
    predicted, label = two_targets()
    predicted[3, 0] = np.nan
    found = score(task, predicted, label)
    metric = {"classification": "roc_auc", "regression": "rmse"}[task]
    assert math.isnan(found.by_target[metric][0])
    assert math.isfinite(found.by_target[metric][1])
    assert all(map(math.isnan, confidence_interval(task, predicted, label, seed=0)))
