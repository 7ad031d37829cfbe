"""The scaling model in cases whose answers are known."""

import dataclasses
import json

import pytest

from benchmarks.scaling_model.collectives import Collective, Group, sent_bytes, step_collectives
from benchmarks.scaling_model.fabric import Cluster, Measured, Speed, fit_speed
from benchmarks.scaling_model.machine import Machine, measured_fabric, step_seconds
from benchmarks.scaling_model.paper import paper_rows, paper_table, resized
from benchmarks.scaling_model.step import Core, Gpu, rank_work, step_time
from benchmarks.scaling_model.validation import Cell, Layout, validation_table, worst_ratio
from hmoe_ds.config_checks import check_config
from hmoe_ds.config_parser import load_config
from hmoe_ds.model.size import count_parameters
from hmoe_ds.training.dry_run import DRUG_LIKE
from hmoe_ds.training.footprint import all_to_all_bytes

GPU = Gpu(250e12, 0.0, 0, 0.0, 1e12)
CLUSTER = Cluster(8, 450e9, 50e9, 3e-6, 8e-6)
FREE = Cluster(8, 1e30, 1e30, 0.0, 0.0)


def preset(name="base_8gpu", *words):
    return load_config(["--config", name, *words])


def parameters(config):
    return count_parameters(config.model, config.router, config.objective.molecule_heads)


def test_one_rank_sends_nothing():
    config = preset("tiny_cpu")
    assert step_collectives(config, 1, DRUG_LIKE) == []
    step = step_time(config, 1, DRUG_LIKE, GPU, CLUSTER)
    assert step.total == step.compute == rank_work(config, 1, DRUG_LIKE).flops / 250e12


@pytest.mark.parametrize("recompute", ["false", "true"])
@pytest.mark.parametrize("ep_size", [2, 8])
def test_experts_traffic_is_that_of_the_footprint(recompute, ep_size):
    config = preset("base_8gpu", f"--parallel.ep_size={ep_size}", f"--parallel.activation_checkpointing={recompute}")
    expected = all_to_all_bytes(config, 16, DRUG_LIKE.atoms, DRUG_LIKE.bonds).per_rank
    assert sent_bytes(step_collectives(config, 16, DRUG_LIKE), "all_to_all") == pytest.approx(expected)


def test_experts_traffic_grows_as_the_share_of_experts_elsewhere():
    sent = {
        ep_size: sent_bytes(
            step_collectives(preset("base_8gpu", f"--parallel.ep_size={ep_size}"), 8, DRUG_LIKE), "all_to_all"
        )
        for ep_size in (1, 2, 4, 8)
    }
    assert sent[1] == 0
    assert sent[2] / (1 / 2) == pytest.approx(sent[4] / (3 / 4)) == pytest.approx(sent[8] / (7 / 8))


def test_migration_sends_its_share_in_more_calls():
    config = preset()
    without, moved = (step_collectives(config, 8, DRUG_LIKE, share) for share in (None, 0.1))
    assert sent_bytes(moved, "all_to_all") == pytest.approx(0.1 * sent_bytes(without, "all_to_all"))
    slices = config.optim.accumulation
    assert sum(one.times for one in moved) == sum(one.times for one in without) + 5 * slices
    for part in ("zero", "loss"):
        assert sent_bytes(moved, part) == sent_bytes(without, part)


@pytest.mark.parametrize(("stage", "volume"), [(1, 2), (2, 2), (3, 3)])
def test_zero_sends_what_its_paper_says(stage, volume):
    """Of a dense model in one slice on many ranks: 2 or 3 times its parameters."""
    config = preset("tiny_cpu", f"--parallel.zero_stage={stage}")
    ranks = 1000
    sent = sent_bytes(step_collectives(config, ranks, DRUG_LIKE, reduction="reduce_scatter"), "zero")
    assert sent == pytest.approx(volume * 4 * parameters(config).total * (ranks - 1) / ranks)


def test_an_all_reduce_sends_the_gradients_twice():
    config = preset("tiny_cpu")
    sent = [
        sent_bytes(step_collectives(config, 4, DRUG_LIKE, reduction=kind), "zero")
        for kind in ("reduce_scatter", "all_reduce")
    ]
    assert sent[1] == pytest.approx(1.5 * sent[0])


def test_later_stages_reduce_every_slice():
    slices = 4
    sent = {
        (stage, count): sent_bytes(
            step_collectives(
                preset("tiny_cpu", f"--parallel.zero_stage={stage}", f"--optim.accumulation={count}"),
                4,
                DRUG_LIKE,
                reduction="reduce_scatter",
            ),
            "zero",
        )
        for stage in (1, 2, 3)
        for count in (1, slices)
    }
    assert sent[1, slices] == pytest.approx(sent[1, 1])
    assert sent[2, slices] == pytest.approx(sent[2, 1] * (slices + 1) / 2)
    assert sent[3, slices] == pytest.approx(sent[3, 1] * slices)


def test_experts_are_reduced_among_their_copies_only():
    config = preset("base_8gpu", "--parallel.ep_size=8")
    count, ranks = parameters(config), 8
    sent = sent_bytes(step_collectives(config, ranks, DRUG_LIKE, reduction="reduce_scatter"), "zero")
    assert sent == pytest.approx(2 * 2 * count.dense * (ranks - 1) / ranks)
    groups = {one.group for one in step_collectives(config, 64, DRUG_LIKE) if one.part == "zero"}
    assert groups == {Group(64), Group(8, stride=8)}
    both = sent_bytes(step_collectives(config, 64, DRUG_LIKE, reduction="reduce_scatter"), "zero")
    assert both == pytest.approx(4 * (count.dense * 63 / 64 + count.experts / 8 * 7 / 8))


def test_without_traffic_weak_scaling_is_perfect_but_for_the_contrastive_loss():
    config = preset("base_8gpu", "--router.gate_size=1")
    few, many = (
        step_time(
            dataclasses.replace(config, data=resized("base_8gpu", "weak", gpus, 8).data), gpus, DRUG_LIKE, GPU, FREE
        )
        for gpus in (8, 64)
    )
    assert many.total == pytest.approx(few.total, rel=0.02)


def test_without_traffic_strong_scaling_divides_the_step():
    few, many = (step_time(preset(), gpus, DRUG_LIKE, GPU, FREE) for gpus in (8, 64))
    assert many.total == pytest.approx(few.total / 8)


def test_a_slice_takes_no_less_than_its_launches():
    gpu = dataclasses.replace(GPU, launch_seconds=1e-5, launches_per_block=100)
    config = preset()
    step = step_time(config, 1024, DRUG_LIKE, gpu, FREE)
    blocks = config.model.lower_blocks + config.model.upper_blocks
    assert step.compute == pytest.approx(config.optim.accumulation * blocks * 1e-3)
    assert step_time(config, 8, DRUG_LIKE, gpu, FREE).compute > 2 * step.compute


def test_a_step_waits_for_a_slow_plan():
    slow = dataclasses.replace(GPU, planned_per_second=1e4)
    config = preset()
    step = step_time(config, 8, DRUG_LIKE, slow, CLUSTER)
    assert step.total == pytest.approx(rank_work(config, 8, DRUG_LIKE).molecules / 1e4)
    assert step_time(config, 8, DRUG_LIKE, GPU, CLUSTER).waiting == 0


def test_migration_makes_the_fullest_rank_wait():
    config = preset()
    without, moved = (step_time(config, 8, DRUG_LIKE, GPU, FREE, share) for share in (None, 0.1))
    assert moved.compute == pytest.approx(config.parallel.migration_budget * without.compute)


def all_to_all(ranks, sent):
    return Collective("all_to_all", "all_to_all", Group(ranks), sent, 1)


def test_an_all_to_all_inside_a_node_takes_the_node_s_bandwidth():
    assert CLUSTER.seconds(all_to_all(8, 450e6)) == pytest.approx(1e-3 + 7 * 3e-6)


def test_an_all_to_all_across_nodes_takes_the_network_s_for_what_leaves():
    # 8 of 15 peers are elsewhere.
    assert CLUSTER.seconds(all_to_all(16, 50e6)) == pytest.approx(1e-3 * 8 / 15 + 7 * 3e-6 + 8 * 8e-6)


def test_a_ring_through_whole_nodes_uses_all_their_ports():
    quick = Cluster(8, 450e9, 50e9, 0.0, 0.0)
    inside, across, copies = (
        quick.seconds(Collective("zero", "all_gather", group, 1e9, 1)) for group in (Group(8), Group(64), Group(8, 8))
    )
    assert inside == pytest.approx(1 / 450)
    assert across == pytest.approx(1 / 400)
    assert copies == pytest.approx(1 / 50)


def test_an_all_reduce_climbs_the_tree_twice():
    up, both = (CLUSTER.seconds(Collective("zero", kind, Group(64), 0.0, 1)) for kind in ("all_gather", "all_reduce"))
    assert up == pytest.approx(3 * 3e-6 + 3 * 8e-6)
    assert both == 2 * up


def test_a_line_is_found_again():
    sent = [0.0, 1e3, 1e5, 1e7]
    speed = fit_speed(sent, [2e-4 + size / 5e8 for size in sent])
    assert speed == pytest.approx(Speed(2e-4, 5e8))


def test_a_line_has_no_negative_latency():
    assert fit_speed([1e3, 1e6], [1e-6, 2e-2]).latency == 0


def test_measured_speeds_are_asked_by_kind_and_group():
    fabric = measured_fabric([{"kind": "all_to_all", "ranks": 2, "latency": 1e-4, "bandwidth": 1e9}])
    assert fabric.seconds(all_to_all(2, 1e6)) == pytest.approx(1.1e-3)
    with pytest.raises(KeyError):
        fabric.seconds(all_to_all(4, 1e6))


def test_ranks_take_turns_on_too_few_cores():
    machine = Machine(2, (0.01, 1e-5), (0.012, 2e-5), 1e-9, {}, 1e6)
    assert machine.core(1) == Core(0.01, 1e-5, 1e-9, 1.0)
    assert machine.core(2) == Core(0.012, 2e-5, 1e-9, 1.0)
    assert machine.core(4) == Core(0.012, 2e-5, 1e-9, 2.0)
    config = preset("tiny_cpu")
    atoms = rank_work(config, 4, DRUG_LIKE).atoms
    step = step_time(config, 4, DRUG_LIKE, machine.core(4), FREE)
    assert step.compute == pytest.approx(2 * (0.012 + 2e-5 * atoms))


def test_steps_at_the_start_do_not_count(tmp_path):
    lines = [{"molecules": 100, "molecules_per_second": rate} for rate in (1, 1, 1, 50, 100, 200)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert step_seconds(tmp_path) == 1.0


def test_the_worst_cell_may_be_above_or_below():
    step = step_time(preset("tiny_cpu"), 1, DRUG_LIKE, Core(1.0, 0.0, 0.0, 1.0), Measured({}))
    cells = [Cell(Layout(1, 1), step, measured, 0.0, 0.0) for measured in (0.8, 1.1, 2.0, 0.9)]
    assert worst_ratio(cells) == 0.5
    assert worst_ratio(cells[:2]) == 1.25
    assert validation_table(cells).count("1 ranks, ep_size 1") == 4
    assert json.loads(json.dumps(cells[0].figures()))["ratio"] == 1.25


@pytest.mark.parametrize("name", ["base_8gpu", "large_multinode"])
@pytest.mark.parametrize("ep_size", [8, 16])
def test_presets_on_paper_are_configurations_that_a_run_can_have(name, ep_size):
    config = resized(name, "weak", 64, ep_size)
    check_config(config)
    assert config.router.groups % ep_size == 0
    strong = resized(name, "strong", 64, ep_size)
    assert strong.data == preset(name).data


def test_rows_on_paper_compare_with_the_fewest_gpus():
    gpu = Gpu(250e12, 5e-6, 170, 1.6e-11, 3e6)
    rows = list(paper_rows("base_8gpu", "weak", [8, 64], [8, 16], [0.1], gpu, CLUSTER))
    assert [(row.gpus, row.ep_size, row.migration_share) for row in rows] == [
        (gpus, ep_size, share) for gpus, ep_size in ((8, 8), (64, 8), (64, 16)) for share in (None, 0.1)
    ]
    assert rows[0].efficiency == 1
    for row in rows:
        assert row.efficiency == pytest.approx(row.molecules_per_second / row.gpus / (rows[0].molecules_per_second / 8))
    assert len(paper_table(rows).splitlines()) == 2 + len(rows)
    assert json.loads(json.dumps([row.figures() for row in rows]))[0]["gpus"] == 8


def test_migration_pays_across_nodes():
    gpu = Gpu(250e12, 5e-6, 170, 1.6e-11, 3e6)
    rows = {
        (row.ep_size, row.migration_share): row.step.all_to_all
        for row in paper_rows("large_multinode", "weak", [64], [8, 16], [0.1], gpu, CLUSTER)
    }
    saved = {ep_size: rows[ep_size, None] - rows[ep_size, 0.1] for ep_size in (8, 16)}
    assert saved[16] > 3 * saved[8] > 0
