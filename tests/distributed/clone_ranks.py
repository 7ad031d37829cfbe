"""Ranks that hold copies of experts to the originals: `python -m tests.distributed.clone_ranks JSON`, command lines."""

import json
import sys

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from hmoe_ds.config_parser import load_config
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.moe.balance import measure_load
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.objectives.total import count_normalizers
from hmoe_ds.training.engine import build_engine, init_distributed, loss_scale
from hmoe_ds.training.expert_clones import split_experts
from hmoe_ds.training.feed import rank_slice
from hmoe_ds.training.recording.metrics import StepTotals


def all_experts(executor):
    """-> the rows of all experts, for each weight: in the model, in the master, both moments."""
    rows = []
    for weight in executor.experts.parameters():
        moments = [safe_get_full_optimizer_state(weight, name) for name in ("exp_avg", "exp_avg_sq")]
        mine = torch.stack([weight.detach().float(), safe_get_full_fp32_param(weight), *moments])
        parts = [torch.empty_like(mine) for _ in range(executor.ep_size)]
        dist.all_gather(parts, mine, group=executor.ep_group)
        rows.append(torch.cat(parts, dim=1))
    return rows


def check_splits(words, rank, ranks):
    """Train for some steps; after each experts split, and the copies are held to the originals."""
    config = load_config(words)
    engine = build_engine(config, Traffic())
    store = open_mixture(config.data, "train")
    plan = BatchPlan(store, config.data, config.optim.accumulation, config.run.seed)
    crossed = set()
    for step in (1, 2, 3, 4):
        [whole] = plan.next_step()
        part = rank_slice(store, whole, config.objective.mask_ratio, 0, rank, ranks)
        losses, encoding = engine(part, count_normalizers([part], "cpu"))
        engine.backward(losses.total * loss_scale(config))
        engine.step()
        totals = StepTotals(Traffic())
        totals.add(losses, measure_load(encoding.scaffold, encoding.atoms, part.batch.molecule_N, config.router))
        layers = engine.module.model.encoder.moe_layers()
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
        before = [all_experts(layer.executor) for layer in layers]
        splits = split_experts(engine, totals.reduce().load, config, step)
        assert splits
        for number, split in splits.items():
            layer, local = layers[number - 1], layers[number - 1].executor.num_local_experts
            for old, new in zip(before[number - 1], all_experts(layer.executor), strict=True):
                expected = old.clone()
                expected[:, split.slot] = old[:, split.parent]
                assert old[:, split.parent].abs().flatten(1).amax(dim=1).min() > 0
                assert not torch.equal(old, expected)
                assert torch.equal(new, expected)
            crossed.add(split.parent // local != split.slot // local)
            assert layer.gate.slots.parent_E[split.slot] == split.parent
    assert True in crossed, "no copy went to another rank"
    engine.destroy()


if __name__ == "__main__":
    rank, ranks = init_distributed()
    for command_line in json.loads(sys.argv[1]):
        check_splits(command_line, rank, ranks)
