"""Warnings come for gates that have degenerated, and for no others."""

import pytest

from hmoe_ds.config_parser import load_config
from hmoe_ds.training.recording.health import HealthWatch, health_warnings

HEALTHY = {"step": 1000, "chosen_p": 0.36, "routed_over_dense_rms": 1.2, "group_entropy": 0.98}
HEALTHY |= {"starved_experts": 0.0, "data_wait": 0.01, "loss": 1.0}


def config(*overrides):
    return load_config(["--config", "tiny_cpu", *overrides])


@pytest.mark.parametrize(
    ("metric", "value", "words"),
    [
        ("chosen_p", 0.26, "0.26, hardly more than by chance (0.25): molecules get little of their routed output"),
        ("routed_over_dense_rms", 0.03, "0.03 times as large as the dense one beside it (1 at the start): the experts"),
        ("routed_over_dense_rms", 50.0, "the experts drown the rest"),
        ("group_entropy", 0.2, "few groups take most molecules (entropy 0.20 of 1)"),
        ("starved_experts", 0.25, "25% of the experts get less than a tenth of the mean load"),
        ("data_wait", 0.4, "40% of the time is spent waiting for molecules"),
    ],
)
def test_a_degenerate_gate_is_told_of(metric, value, words):
    assert health_warnings(config(), HEALTHY) == {}
    found = health_warnings(config(), HEALTHY | {metric: value})
    assert list(found) == [metric]
    assert words in found[metric]
    # While the learning rate warms up, figures are those of an untrained gate.
    assert health_warnings(config(), HEALTHY | {metric: value, "step": 50}) == {}


@pytest.mark.parametrize(
    "overrides", [["--router.form=soft"], ["--router.form=flat"], ["--router.group_choice=random"]]
)
def test_a_probability_that_no_weight_contains_is_of_no_concern(overrides):
    assert "chosen_p" not in health_warnings(config(*overrides), HEALTHY | {"chosen_p": 0.25})


def test_groups_that_say_nothing_are_of_no_concern():
    assert health_warnings(config("--router.form=flat"), HEALTHY | {"group_entropy": 0.2}) == {}


def test_a_loss_that_jumps_is_told_of_and_one_that_wavers_is_not():
    recent = [1.0, 1.03, 0.98, 1.01, 0.99, 1.02, 0.97, 1.0, 1.01, 0.99]
    for loss in (0.5, 1.08):
        assert health_warnings(config(), HEALTHY | {"loss": loss}, recent) == {}
    assert "jumped to 1.5 from about 1:" in health_warnings(config(), HEALTHY | {"loss": 1.5}, recent)["loss"]
    assert health_warnings(config(), HEALTHY | {"loss": 1.5}, recent[:5]) == {}, "too few to tell"


def test_trouble_is_told_once_while_it_lasts():
    watch = HealthWatch(config())
    sick = HEALTHY | {"group_entropy": 0.2}
    told = [len(watch.news(sick if line % 5 == 0 else HEALTHY)) for line in range(60)]
    assert told == [1] + 59 * [0], "it comes and goes within a few lines"
    for _ in range(20):
        assert watch.news(HEALTHY) == []
    assert ["collapses" in text for text in watch.news(sick)] == [True]


def test_a_watch_knows_the_losses_before():
    watch = HealthWatch(config())
    assert [text for _ in range(12) for text in watch.news(HEALTHY)] == []
    assert ["jumped" in text for text in watch.news(HEALTHY | {"loss": 2.0})] == [True]
