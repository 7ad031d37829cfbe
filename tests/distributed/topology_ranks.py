"""Ranks that load checkpoints of other topologies: `python -m tests.distributed.topology_ranks JSON`, a list of jobs.

A job is the name of a function here and its arguments.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch

from hmoe_ds.config_parser import load_config
from hmoe_ds.model.checkpoint_record import write_record
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.training.checkpoints import checkpoint
from hmoe_ds.training.checkpoints.checkpoint import load_checkpoint
from hmoe_ds.training.checkpoints.topology import convert, load_universal
from hmoe_ds.training.engine import build_engine, init_distributed
from hmoe_ds.training.loop import train


def save_again(words, folder):
    """Load the latest checkpoint of a run and save what is there then, as the checkpoint `folder`."""
    config = load_config(words)
    engine = build_engine(config, Traffic())
    load_checkpoint(engine, config)
    save(engine, Path(folder), config.to_dict())


def forget(words):
    """Go on with a run, but without what Adam knew."""
    load = checkpoint.load_from_another

    def load_less(engine, *arguments):
        load(engine, *arguments)
        for state in engine.optimizer.state.values():
            for value in state.values():
                value.zero_()

    checkpoint.load_from_another = load_less
    train(load_config(words), torch.distributed.get_rank(), torch.distributed.get_world_size())
    checkpoint.load_from_another = load


def more_ranks_than_pieces(folder, precision):
    """Save, convert and load a group of parameters of which the last rank has nothing but padding."""
    before, after = small_engine(precision), small_engine(precision)
    for _ in range(2):
        before.backward(before(torch.ones(4, device=before.device)))
        before.step()
    folder, parallel = Path(folder), {"zero_stage": 1, "ep_size": 1, "precision": precision}
    save(before, folder / "saved", {"parallel": parallel})
    rank = torch.distributed.get_rank()
    convert(folder / "saved", folder / "universal", rank, torch.distributed.get_world_size())
    torch.distributed.barrier()
    load_universal(after, folder / "universal", ep_size=1)
    weights = after.optimizer.bit16_groups if precision == "fp32" else after.optimizer.bf16_groups
    assert [weight._hp_mapping is None for weight in weights[1]] == [rank == 1]
    for one, other in zip(before.module.parameters(), after.module.parameters(), strict=True):
        assert (one == other).all()
    for one, other in zip(before.optimizer.state.values(), after.optimizer.state.values(), strict=True):
        assert one.keys() == other.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all((one[name] == other[name]).all() for name in one)
        assert one["step"] == 2


class Small(torch.nn.Module):
    """Two parameters in groups of their own."""

    def __init__(self):
        super().__init__()
        self.many, self.few = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (self.many.float() @ x).sum() + (self.few.float() ** 2).sum()


def small_engine(precision):
    model = Small()
    optimizer = torch.optim.AdamW([{"params": [model.many]}, {"params": [model.few]}], lr=0.1, fused=True)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": precision == "bf16"},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def save(engine, folder, config):
    """Save what `convert` looks at."""
    engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    if torch.distributed.get_rank() == 0:
        ranks = torch.distributed.get_world_size()
        write_record(folder, {"step": 0, "dataset": "", "ranks": ranks, "config": config})
    torch.distributed.barrier()


if __name__ == "__main__":
    init_distributed()
    for name, *arguments in json.loads(sys.argv[1]):
        globals()[name](*arguments)
