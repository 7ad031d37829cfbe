"""Routing figures against definitions; the metrics file."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from hmoe_ds.moe.agreement import consistency, mutual_information
from hmoe_ds.moe.balance import update_route_bias
from hmoe_ds.training.recording import metrics
from hmoe_ds.training.recording.metrics import (
    StepFile,
    group_entropy,
    last_figures,
    load_imbalance,
    rms_ratio,
    starved_share,
)
from tests.limited_files import limited_files


def slow_consistency(scaffolds, groups):
    cyclic = [(s, g) for s, g in zip(scaffolds, groups, strict=True) if s != 0]
    per_scaffold = []
    for scaffold in {s for s, _ in cyclic}:
        members = [g for s, g in cyclic if s == scaffold]
        pairs = list(itertools.combinations(members, 2))
        if pairs:
            per_scaffold.append(np.mean([a == b for a, b in pairs]))
    different = [a == b for (s, a), (t, b) in itertools.combinations(cyclic, 2) if s != t]
    a_same, a_diff = np.mean(per_scaffold), np.mean(different)
    return (a_same - a_diff) / (1 - a_diff)


def test_consistency_matches_its_definition():
    generator = np.random.default_rng(0)
    scaffolds = generator.integers(-3, 8, 80)
    groups = generator.integers(0, 4, 80)
    assert consistency(scaffolds, groups) == pytest.approx(slow_consistency(scaffolds.tolist(), groups.tolist()))


def test_consistency_of_perfect_and_collapsed_gates():
    scaffolds = np.array([1, 1, 2, 2, 3, 3, 0])
    assert consistency(scaffolds, np.array([0, 0, 1, 1, 2, 2, 0])) == pytest.approx(1.0)
    assert consistency(scaffolds, np.zeros(7, np.int64)) == 0.0
    assert math.isnan(consistency(np.array([1, 2, 3]), np.array([0, 1, 2])))


@pytest.mark.parametrize("groups", [1, 3, 8])
def test_mutual_information_is_sklearns(groups):
    generator = np.random.default_rng(groups)
    scaffolds = generator.integers(-3, 8, 200)
    group = (scaffolds + generator.integers(0, 2, 200)) % groups
    cyclic = scaffolds != 0
    expected = normalized_mutual_info_score(scaffolds[cyclic], group[cyclic])
    assert mutual_information(scaffolds, group) == pytest.approx(expected, abs=1e-12)


def test_mutual_information_of_no_scaffolds_and_of_one():
    assert math.isnan(mutual_information(np.zeros(3, np.int64), np.array([0, 1, 2])))
    assert mutual_information(np.ones(3, np.int64), np.zeros(3, np.int64)) == 0.0


def test_rms_ratio():
    assert rms_ratio(torch.tensor([[4.0, 1.0], [9.0, 9.0]])) == pytest.approx((2.0 + 1.0) / 2)


def test_group_entropy_and_load():
    assert group_entropy(torch.tensor([5.0, 5.0, 5.0, 5.0])) == pytest.approx(1.0)
    assert group_entropy(torch.tensor([9.0, 0.0])) == 0.0
    assert load_imbalance(torch.tensor([[1.0, 3.0], [2.0, 2.0]])) == pytest.approx((1.5 + 1.0) / 2)
    live_L = torch.tensor([2, 3])
    assert load_imbalance(torch.tensor([[1.0, 3, 0], [2.0, 2, 2]]), live_L) == pytest.approx((1.5 + 1.0) / 2)


def test_the_bias_moves_load_from_full_to_empty_groups():
    bias = torch.zeros(4)
    update_route_bias(bias, torch.tensor([10.0, 0.0, 0.0, 0.0]), rate=0.1)
    assert bias[0] < bias[1] == bias[2] == bias[3]
    assert bias.sum().item() == pytest.approx(0.0, abs=1e-6)
    frozen = bias.clone()
    update_route_bias(bias, torch.tensor([10.0, 0.0, 0.0, 0.0]), rate=0.0)
    assert torch.equal(bias, frozen)


def test_metrics_file_drops_later_steps_and_fragments(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    StepFile(path, after_step=2).write({"step": 3, "loss": 1.5})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [3.0, 2.0, 1.5]


def test_lines_wait_for_a_disk_that_is_full(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = StepFile(path, after_step=0)
    lines.write({"step": 1})
    with limited_files(path.stat().st_size + 5):
        for step in (2, 3):
            lines.write({"step": step})
        assert path.read_text() == '{"step": 1}\n'  # no piece of a line
        lines.flush()
    lines.write({"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{path} cannot be written ([Errno 27] File too large); the training goes on" in said


def test_lines_that_wait_are_not_more_and_more(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_MAX_UNWRITTEN", 2)
    path = tmp_path / "metrics.jsonl"
    lines = StepFile(path, after_step=0)
    with limited_files(5):
        for step in (1, 2, 3):
            lines.write({"step": step})
    lines.flush()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 3]


def test_starved_experts_have_less_than_a_tenth_of_the_mean_of_those_that_live():
    atoms_LE = torch.tensor([[100.0, 100.0, 5.0, 0.0], [50.0, 50.0, 50.0, 0.0]]).double()
    assert starved_share(atoms_LE) == pytest.approx(3 / 8)  # means 51.25 and 37.5
    assert starved_share(atoms_LE, torch.tensor([3, 3])) == pytest.approx(1 / 6)  # the last slot is free


def test_last_figures_are_of_different_lines(tmp_path):
    lines = [{"step": 1, "validation_loss": 3.0, "probe_a": 0.5}, {"step": 2, "validation_loss": 2.0}, {"step": 3}]
    lines.append({"step": 4, "validation_loss": None})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = last_figures(tmp_path / "m.jsonl", ("validation_", "probe_"))
    assert found == {"validation_loss": 2.0, "probe_a": 0.5}
