"""Layouts of one and the same run, and what every one of them must agree with."""

import itertools
import json

import pytest
import torch

from hmoe_ds.config_parser import load_config
from hmoe_ds.downstream.export import export_checkpoint
from hmoe_ds.model.hmoe import HMoEModel
from tests.distributed.harness import arguments, train_all
from tests.distributed.reference import reference_run
from tests.distributed.routing_log import read_routing

# A tight clip norm, so that a wrong norm shows in the parameters; four experts to choose two from in each group.
CLIPPED = {"optim__clip_norm": 0.5, "router__experts": 16}
ACCUMULATED = CLIPPED | {"optim__accumulation": 3, "data__molecules_per_step": 96}
TWO_GROUPS = CLIPPED | {"router__groups_per_molecule": 2}

ZERO = {
    "zero 1": {},
    "zero 2": {"parallel__zero_stage": 2},
    "zero 2 offload": {"parallel__zero_stage": 2, "parallel__offload_optimizer": "true"},
    "zero 3": {"parallel__zero_stage": 3},
    # Small models fit into ZeRO-3's buckets and thresholds as a whole; with these settings every parameter is spread.
    "zero 3 spread": {"parallel__zero_stage": 3, "parallel__deepspeed_config": "zero3_spread.json"},
}
ZERO3_SPREAD = {
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": 5000,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 1000,
        "stage3_max_live_parameters": 3000,
        "stage3_max_reuse_distance": 1000,
    },
    "data_types": {"grad_accum_dtype": "fp32"},
}
TOPOLOGY = {
    "1 rank": (1, {}),
    "2 ranks": (2, {}),
    "2 ranks ep 2": (2, {"parallel__ep_size": 2}),
    "4 ranks ep 2": (4, {"parallel__ep_size": 2}),
}
MIXTURE = ACCUMULATED | {"data__path": "mixture", "data__weights": [1.0, 2.5]}
# What the gate and its losses can do, in three runs.
SOFT = ACCUMULATED | {
    "router__form": "soft",
    "router__experts_per_atom": 4,
    "router__top_p": 0.6,
    "curriculum__guidance_steps": 3,
    "objective__contrast_bare_scaffold": "true",
    "objective__contrast_of": "distribution",
    "objective__balance_weight": 0.1,
    "objective__entropy_weight": 0.05,
}
ADDITIVE = CLIPPED | {
    "router__form": "additive",
    "router__experts_per_atom": 3,
    "objective__contrast_learned_temperature": "true",
    "objective__balance_weight": 0.1,
}
RANDOM = CLIPPED | {"router__group_choice": "random", "objective__contrast_bare_scaffold": "true"}
CURRICULUM = {
    "curriculum__competence": "linear",
    "curriculum__competence_start": 0.3,
    "curriculum__competence_steps": 5,
    "curriculum__atom_fade_steps": 3,
    "curriculum__temperature_steps": 4,
    "curriculum__mask_steps": 5,
}
TARGETS = ACCUMULATED | {
    "data__path": "targets",
    "objective__fingerprint_weight": 0.3,
    "objective__descriptor_weight": 0.6,
}
# Experts of two groups that share a pool, so that copies go from rank to rank; then of groups that keep to themselves.
SPLITS = CLIPPED | {
    "router__groups": 2,
    "router__form": "flat",
    "router__experts_at_start": 4,
    "router__split_every": 2,
    "run__steps": 7,
}
SPLITS_IN_GROUPS = CLIPPED | {
    "router__experts_at_start": 12,
    "router__split_every": 1,
    "router__reclaim_load": 0.6,
    "router__split_generations": 2,
    "run__steps": 6,
}
# With an ep_size of 2 each block of groups is on one rank.
BLOCKS = {"router__group_blocks": 2, "router__block_bonus": 0.1}
MIGRATION = {"parallel__migration": "true", "parallel__migration_budget": 1.05}
BATCH = {
    "": CLIPPED,
    "accumulation": ACCUMULATED,
    "two groups": TWO_GROUPS,
    "mixture": MIXTURE,
    "soft": SOFT,
    "additive": ADDITIVE,
    "random": RANDOM,
    "curriculum": TWO_GROUPS | CURRICULUM,
    "targets": TARGETS,
    "splits": SPLITS,
    "splits in groups": SPLITS_IN_GROUPS,
    "migration": ACCUMULATED | MIGRATION | {"run__steps": 20},
    "migration of two groups": TWO_GROUPS | BLOCKS | MIGRATION | CURRICULUM,
    "migration with targets": TARGETS | MIGRATION,
    "no split": SPLITS | {"router__split_every": 100},
}
RECOMPUTE = {"": {}, "recompute": {"parallel__activation_checkpointing": "true"}}
PRECISION = {"": {}, "bf16": {"parallel__precision": "bf16"}}


def layout(topology, zero, batch="", recompute="", precision=""):
    """-> (name, (ranks, overrides))."""
    ranks, overrides = TOPOLOGY[topology]
    name = ", ".join(part for part in (topology, zero, batch, recompute, precision) if part)
    return name, (ranks, BATCH[batch] | overrides | ZERO[zero] | RECOMPUTE[recompute] | PRECISION[precision])


def every_layout(precision):
    """The product of everything above, for one precision."""
    batches = ["", "accumulation", "two groups"] if precision == "" else ["", "accumulation"]
    names = itertools.product(TOPOLOGY, ZERO, batches, RECOMPUTE)
    return dict(layout(*parts, precision) for parts in names)


class Trained:
    """Runs of layouts on one dataset, and the references that they are compared with.

    Args:
        dataset: dataset directory.
        folder: where the runs are put.
        layouts: {name: (ranks, overrides)}.
        second: dataset that mixtures mix with the first.
        targets: dataset of layouts with molecule-level objectives.
    """

    def __init__(self, dataset, folder, layouts, second=None, targets=None):
        (folder / "zero3_spread.json").write_text(json.dumps(ZERO3_SPREAD))
        self.dataset = dataset
        known = {
            "zero3_spread.json": str(folder / "zero3_spread.json"),
            "mixture": [str(dataset), str(second)],
            "targets": str(targets),
        }
        self._layouts = {
            name: (ranks, {key: known.get(str(value), value) for key, value in changes.items()})
            for name, (ranks, changes) in layouts.items()
        }
        self._out = {name: folder / name.replace(", ", "_").replace(" ", "_") for name in layouts}
        self._metrics, self._references = {}, {}
        for ranks in sorted({count for count, _ in layouts.values()}):
            runs = {self._out[name]: changes for name, (count, changes) in self._layouts.items() if count == ranks}
            self._metrics |= train_all(runs, dataset, ranks)

    def run(self, name):
        """-> (folder, lines of metrics)."""
        return self._out[name], self._metrics[self._out[name]]

    def routing(self, name):
        """-> the choices of all ranks of a run."""
        return read_routing(self._out[name], self._layouts[name][0])

    def clip_norm(self, name):
        """The clip norm of a run."""
        return self._layouts[name][1]["optim__clip_norm"]

    def reference(self, name):
        """What the run must agree with; computed once for all runs that differ in `parallel` alone."""
        overrides = self._layouts[name][1]
        shared = {key: value for key, value in overrides.items() if not key.startswith("parallel")}
        key = str(sorted(shared.items()))
        if key not in self._references:
            config = load_config(arguments("unused", self.dataset, **shared))
            self._references[key] = reference_run(config)
        return self._references[key]


def check_agreement(trained, name, tmp_path):
    """Invariant 2: first the same routing choices, then the same losses, gradient norms and parameters."""
    folder, lines = trained.run(name)
    history, choices, weights = trained.reference(name)
    assert trained.routing(name) == choices
    assert [line["step"] for line in lines] == list(range(1, len(history) + 1))
    assert all(norm > trained.clip_norm(name) for _, norm, _ in history), "clipping must bite to mean anything"
    for line, (loss, norm, _) in zip(lines, history, strict=True):
        assert line["loss"] == pytest.approx(loss, abs=2e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=2e-4)
    exported = _export(folder, tmp_path).state_dict()
    assert exported.keys() == weights.keys()
    for key, value in exported.items():
        torch.testing.assert_close(value.double(), weights[key].double(), rtol=1e-4, atol=2e-5)


def check_bf16(trained, name, tmp_path):
    """A bf16 run follows the fp64 reference as closely as 8 bits can; without clipping it would be far away.

    Rounding changes some choices between experts that are nearly equal, and from then on the runs differ a little more.
    """
    folder, lines = trained.run(name)
    history, choices, weights = trained.reference(name)
    assert _share_routed_alike(trained.routing(name), choices) > 0.93
    for line, (loss, norm, _) in zip(lines, history, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=0.02)
        assert line["grad_norm"] == pytest.approx(norm, rel=0.02 if line["step"] <= 2 else 0.1)
    model = _export(folder, tmp_path)
    assert model.dtype == torch.bfloat16
    for key, weight in model.named_parameters():
        torch.testing.assert_close(weight.double(), weights[key], rtol=0.02, atol=0.01)


def _share_routed_alike(found, expected):
    """Share of the atoms, counted once per layer, that chose the same experts."""
    assert found.keys() == expected.keys()
    alike = [
        one == other
        for key in expected
        for layer_found, layer_expected in zip(found[key][1], expected[key][1], strict=True)
        for one, other in zip(layer_found, layer_expected, strict=True)
    ]
    return sum(alike) / len(alike)


def _export(folder, tmp_path):
    export_checkpoint(folder, tmp_path / "model")
    return HMoEModel.from_pretrained(tmp_path / "model")
